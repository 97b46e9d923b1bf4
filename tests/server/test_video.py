"""Videos on a server with tight limits: which are accepted, and which are refused."""

import base64
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests import clips, hostile_videos
from tests.conftest import Origin, Server
from tests.pictures import data_url, encode, series_url, shape, text_part, user, video_part

WHAT = text_part("What is in the video?")
RED, BLUE = (np.asarray(shape(color))[:, :, ::-1] for color in ("red", "blue"))


@pytest.fixture(scope="module")
def web(tight: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tight.url, timeout=60) as client:
        yield client


def ask(web: httpx.Client, url: str, **more: Any) -> httpx.Response:
    body = {
        "model": "saccade-tiny",
        "messages": user(WHAT, video_part(url)),
        "temperature": 0,
        "max_tokens": 8,
    }
    return web.post("/v1/chat/completions", json={**body, **more})


def shown(response: httpx.Response) -> tuple[str, int]:
    """The answer and the number of prompt tokens."""
    assert response.status_code == 200, response.text
    document = response.json()
    return document["choices"][0]["message"]["content"], document["usage"]["prompt_tokens"]


def refusal(response: httpx.Response, param: str = "messages[0].content[1].video_url") -> Any:
    """The error's code, after a check of its param and that it shows no library internals."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["param"] == param
    for word in ("Traceback", "vllm", "cv2", "OpenCV", "pydantic", "array("):
        assert word not in error["message"]
    return error["code"]


def mp4_url(data: bytes) -> str:
    return data_url(data, "video/mp4")


def test_a_video_gives_the_same_answer_in_every_container(web: httpx.Client) -> None:
    frames = [RED, RED, BLUE, BLUE]
    mp4, *others = (
        shown(ask(web, mp4_url(clips.of_frames(frames, suffix, fps=2))))
        for suffix in (".mp4", ".mkv", ".mov")
    )
    assert others == [mp4, mp4]
    assert mp4[1] > shown(ask(web, mp4_url(clips.of_frames(frames[:2], fps=2))))[1]


def test_a_video_can_be_sent_as_jpeg_frames(web: httpx.Client) -> None:
    pictures = [encode(shape(color), "JPEG") for color in ("red", "blue")]
    texts = [base64.b64encode(each).decode() for each in pictures]
    few, many = (
        shown(ask(web, "data:video/jpeg;base64," + ",".join(texts * times))) for times in (1, 4)
    )
    assert many[1] > few[1]


def test_a_video_url_is_fetched_through_the_address_guard(
    web: httpx.Client, origin: Origin
) -> None:
    origin.files["/clip"] = clips.of_frames([RED, RED])
    there = shown(ask(web, f"{origin.url}/clip"))
    assert there == shown(ask(web, mp4_url(origin.files["/clip"])))
    origin.files["/list"] = clips.PLAYLIST
    assert refusal(ask(web, f"{origin.url}/list")) == "unsupported_video_format"
    for url in ("http://169.254.169.254/clip", "file:///etc/passwd"):
        assert refusal(ask(web, url)) == "image_url_blocked"


def test_vllms_video_options_choose_the_frames(web: httpx.Client) -> None:
    url = mp4_url(clips.of_frames([RED] * 16, fps=2))

    def tokens(**options: Any) -> int:
        return shown(ask(web, url, media_io_kwargs={"video": options}))[1]

    assert tokens(fps=2) > tokens(fps=1)
    for name, value in (("num_frames", 0), ("video_backend", "nemotron_vl")):
        bad = ask(web, url, media_io_kwargs={"video": {name: value}})
        assert refusal(bad, f"media_io_kwargs.video.{name}") == "invalid_request"


GOOD = clips.of_frames([RED, RED])


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (mp4_url(clips.SDP), "unsupported_video_format"),
        (mp4_url(clips.PLAYLIST), "unsupported_video_format"),
        (mp4_url(clips.CONCAT), "unsupported_video_format"),
        (mp4_url(b"\0\0\0\x18ftypisom" + clips.SDP), "invalid_video"),
        (mp4_url(GOOD[: len(GOOD) // 2]), "invalid_video"),
        (mp4_url(clips.referring(GOOD, b"url ", b"http://127.0.0.1:9/x\0")), "invalid_video"),
        (mp4_url(b"\0\0\0\x18ftypisom" + bytes(5 << 20)), "video_too_large"),
        ("data:video/mp4,plain", "unsupported_video_format"),
        ("data:video/mp4;base64,@@@@", "invalid_image_url"),
        ("data:video/jpeg;base64,/9j/4AAQSkZJRg==,AAAA", "invalid_video"),
    ],
)
def test_an_invalid_video_is_refused_at_once(web: httpx.Client, url: str, code: str) -> None:
    """FFmpeg would treat a session description as a live stream, and wait 10 s for it."""
    started = time.monotonic()
    assert refusal(ask(web, url)) == code
    assert time.monotonic() - started < 8


def test_a_video_over_the_memory_limit_is_refused(web: httpx.Client, tight: Server) -> None:
    wide = encode(Image.new("L", (7000, 5000)))  # 100 MiB as RGB
    assert refusal(ask(web, series_url(wide, wide))) == "video_too_large"
    assert not tight.named("VideoDecoder")
    assert shown(ask(web, mp4_url(GOOD)))


def test_hostile_videos_are_refused_with_our_codes(web: httpx.Client, tight: Server) -> None:
    codes = {
        name: refusal(ask(web, mp4_url(data))) for name, data in hostile_videos.foreign().items()
    }
    assert set(codes.values()) == {"unsupported_video_format"}
    for name, data in hostile_videos.lying().items():
        large = name in ("10^9 samples", "65535x65535")
        assert refusal(ask(web, mp4_url(data))) == ("video_too_large" if large else "invalid_video")
    for data in hostile_videos.odd().values():  # the model's rule may refuse so few frames
        assert ask(web, mp4_url(data)).status_code in (200, 400)
    assert not tight.named("VideoDecoder")
    assert shown(ask(web, mp4_url(GOOD)))


def test_pictures_of_a_video_are_refused_by_their_headers(web: httpx.Client) -> None:
    """A few kilobytes each, of 100 megapixels."""
    large = base64.b64encode(encode(Image.new("1", (10_000, 10_000)), "PNG")).decode()
    assert refusal(ask(web, "data:video/jpeg;base64," + ",".join([large] * 8))) == "video_too_large"

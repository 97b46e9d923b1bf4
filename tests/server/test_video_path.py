"""Videos on the server's own path: the same answers as by vLLM's, caps, caches and details."""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests import encoded_videos
from tests.conftest import Origin
from tests.pictures import (
    data_url,
    encode,
    image_part,
    series_url,
    shape,
    text_part,
    user,
    video_part,
)
from tests.scrape import scrape, value

MODEL = "saccade-tiny"
WHAT = text_part("What moves in the video?")
CLIP = encoded_videos.video("h264", "mp4", 75, (320, 240))  # 3 s
OTHER = encoded_videos.video("vp9", "matroska", 50, (256, 256))


def clip(data: bytes = CLIP, **options: Any) -> dict[str, Any]:
    return video_part(data_url(data, "video/mp4"), **options)


def ask(http: httpx.Client, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": user(*parts),
        "max_tokens": 8,
        "temperature": 0,
        "include_image_details": True,
        **more,
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text(answer: dict[str, Any]) -> tuple[str, int]:
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def video_tokens(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["video_tokens"]
    return tokens


def decoded(http: httpx.Client) -> float:
    """How many videos were decoded on the server's own path."""
    return value(scrape(http), "saccade_video_decode_seconds_count")


def test_a_picture_between_two_videos_is_told_from_them(http: httpx.Client) -> None:
    picture = image_part(encode(shape("red")))
    parts = (clip(num_frames=4), picture, clip(OTHER), WHAT)
    ours = ask(http, *parts)
    assert len(ours["image_details"]) == 1
    assert ours["video_details"][0]["frames"] == [0, 25, 49, 74]
    usage = ours["usage"]["prompt_tokens_details"]
    assert usage["image_tokens"] == ours["image_details"][0]["tokens"]
    assert usage["video_tokens"] == sum(video["tokens"] for video in ours["video_details"])
    alone = ask(http, clip(OTHER), WHAT)
    assert alone["video_details"][0]["tokens"] == ours["video_details"][1]["tokens"]


def test_a_repeated_video_is_not_decoded_again(http: httpx.Client) -> None:
    first = ask(http, clip(num_frames=3), WHAT)
    before = decoded(http)
    again = ask(http, text_part("And again?"), clip(num_frames=3))
    assert decoded(http) == before
    assert first["video_details"][0]["cached"] == "none"
    assert again["video_details"][0]["cached"] == "embedding"
    assert again["video_details"][0]["tokens"] == first["video_details"][0]["tokens"]


def test_equal_videos_at_the_same_time_are_decoded_once(http: httpx.Client) -> None:
    before = decoded(http)
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: ask(http, clip(num_frames=5), WHAT), range(6)))
    assert decoded(http) == before + 1
    assert len({text(answer) for answer in answers}) == 1


def test_details_tell_which_frames_the_model_saw(http: httpx.Client) -> None:
    answer = ask(http, clip(fps=2, start=1, end=2.5), WHAT)
    (video,) = answer["video_details"]
    assert (video["width"], video["height"]) == (320, 240)
    assert video["times"] == [round(frame / 25, 3) for frame in video["frames"]]
    assert 25 <= video["frames"][0] <= video["frames"][-1] < 63
    assert video["tokens"] == video_tokens(answer)


def cost(http: httpx.Client, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = http.post("/v1/images/tokens", json={"messages": user(*parts), **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_cost_is_known_before_anything_is_decoded(http: httpx.Client) -> None:
    around = set()
    for options in ({}, {"max_tokens": 100}, {"num_frames": 6}, {"max_tokens": 40, "fps": 5}):
        before = decoded(http)
        told = cost(http, clip(**options))
        assert decoded(http) == before
        (row,) = told["videos"]
        answer = ask(http, clip(**options), WHAT)
        (shown,) = answer["video_details"]
        assert {key: row[key] for key in shown.keys() - {"cached"}} == {
            key: value for key, value in shown.items() if key != "cached"
        }
        without = ask(http, WHAT)["usage"]["prompt_tokens"]
        around.add(answer["usage"]["prompt_tokens"] - without - row["prompt_tokens"])
        assert row["tokens"] <= options.get("max_tokens", 1 << 20)
    assert len(around) == 1  # the chat template's tokens around the video


def test_a_budget_is_shared_by_pictures_and_videos(http: httpx.Client) -> None:
    picture = image_part(encode(shape("blue")))
    whole = ask(http, clip(), picture, WHAT)["usage"]["prompt_tokens_details"]
    total = whole["video_tokens"] + whole["image_tokens"]
    for budget in (total - 1, total // 2, total // 5):
        told = cost(http, clip(), picture, max_image_tokens=budget)["usage"]
        usage = ask(http, clip(), picture, WHAT, max_image_tokens=budget)["usage"]
        details = usage["prompt_tokens_details"]
        assert details["video_tokens"] + details["image_tokens"] <= budget
        assert details["video_tokens"] == told["video_tokens"]
        assert details["image_tokens"] == told["image_tokens"]


def test_a_part_without_frames_is_refused(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": user(clip(start=99), WHAT)}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0].video_url"


def refusal(http: httpx.Client, *parts: dict[str, Any], **more: Any) -> tuple[str, str]:
    """The code and the param of the error for a request with these parts."""
    body = {"model": MODEL, "messages": user(*parts, WHAT), "max_tokens": 4, **more}
    response = http.post("/v1/chat/completions", json=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    return error["code"], error["param"]


PART = "messages[0].content[0]"


def test_caps_hold_for_a_named_video_and_for_pictures(http: httpx.Client) -> None:
    frames = [encode(shape(color), "JPEG") for color in ("red", "blue", "green", "black")] * 3
    series = video_part(series_url(*frames))
    for part in ({**clip(), "uuid": "capped"}, series, {**series, "uuid": "series"}):
        free = video_tokens(ask(http, part, WHAT))
        holder = part["video_url"]
        for cap in (free - 1, free // 3):
            capped = {**part, "video_url": {**holder, "max_tokens": cap}}
            for got in (ask(http, capped, WHAT), ask(http, part, WHAT, max_image_tokens=cap)):
                assert video_tokens(got) <= cap
                assert got["video_details"][0]["tokens"] == video_tokens(got)
        told = cost(http, part)["videos"][0]
        assert told["tokens"] == free


def test_a_named_video_need_not_be_sent_again(http: httpx.Client) -> None:
    first = ask(http, {**clip(num_frames=7), "uuid": "seven"}, WHAT)
    before = decoded(http)
    named = {"type": "video_url", "video_url": {"num_frames": 7}, "uuid": "seven"}
    again = ask(http, named, WHAT)
    assert text(again) == text(first)
    assert again["video_details"][0]["cached"] == "embedding"
    assert decoded(http) == before
    new = {**named, "video_url": {"num_frames": 9}}
    assert refusal(http, new) == ("unknown_image", f"{PART}.video_url")
    unknown = {"type": "video_url", "video_url": None, "uuid": "never"}
    assert refusal(http, unknown) == ("unknown_image", f"{PART}.uuid")


def test_pictures_are_the_frames_of_a_video(http: httpx.Client, origin: Origin) -> None:
    """In a list of URLs or in one URL, with the rate that the part tells."""
    frames = [encode(shape(color), "PNG") for color in ("red", "blue", "green", "black")]
    origin.files["/frame"] = frames[3]
    urls = [*map(data_url, frames[:3]), f"{origin.url}/frame"]
    ours = ask(http, {"type": "video", "video": urls, "fps": 2}, WHAT)
    (video,) = ours["video_details"]
    assert (video["frames"], video["times"]) == ([0, 1, 2, 3], [0, 0.5, 1, 1.5])
    same = video_part(series_url(*frames), fps=2)
    assert text(ask(http, same, WHAT)) == text(ours)
    fewer = ask(http, video_part(series_url(*frames), fps=2, start=0.5, end=1.5), WHAT)
    assert fewer["video_details"][0]["frames"] == [1, 2]


def test_pictures_of_a_video_are_checked_like_others(http: httpx.Client) -> None:
    red, wide = encode(shape("red")), encode(shape("red", size=(224, 225)))
    bad = "http://169.254.169.254/frame"
    for urls, code in (
        ([data_url(red), data_url(wide)], "invalid_video"),
        ([data_url(red), data_url(b"no picture")], "invalid_video"),
        ([data_url(red), data_url(red[: len(red) // 2])], "invalid_video"),
        ([data_url(red), bad], "image_url_blocked"),
        ([], "invalid_video"),
        ([data_url(red)] * 2049, "too_many_images"),
    ):
        assert refusal(http, {"type": "video", "video": urls}) == (code, f"{PART}.video")
    not_a_url = refusal(http, {"type": "video", "video": [data_url(red), 5]})
    assert not_a_url == ("invalid_image_url", f"{PART}.video[1]")


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_is_a_video_where_the_part_asks_for_one(http: httpx.Client, kind: str) -> None:
    frames = [shape(color) for color in ("red", "blue", "green", "black", "red", "blue")]
    file = io.BytesIO()
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], duration=[500, 250, 250, 500, 500, 0]
    )
    url = data_url(file.getvalue(), f"image/{kind.lower()}")
    (video,) = ask(http, video_part(url, num_frames=6), WHAT)["video_details"]
    assert video["frames"] == [0, 1, 2, 3, 4, 5]
    assert video["times"] == [0, 0.5, 0.75, 1, 1.5, 2]
    picture = ask(http, {"type": "image_url", "image_url": {"url": url}}, WHAT)
    assert len(picture["image_details"]) == 1
    cut = data_url(file.getvalue()[: len(file.getvalue()) // 2], "image/gif")
    assert refusal(http, video_part(cut))[0] == "invalid_video"


CLIP_URL = data_url(CLIP, "video/mp4")
CLIP_DATA = CLIP_URL.partition(",")[2]
SPELLINGS = [
    {"type": "video_url", "video_url": CLIP_URL},
    {"type": "input_video", "video_url": CLIP_URL},
    {"type": "input_video", "video_url": {"url": CLIP_URL}},
    {"type": "input_video", "input_video": {"data": CLIP_DATA, "format": "mp4"}},
    {"type": "video", "video": CLIP_URL},
    {"type": "video", "video": {"url": CLIP_URL}},
    {"type": "file", "file": {"file_data": CLIP_URL, "filename": "clip.mp4"}},
    {"type": "file", "file": {"file_data": CLIP_DATA}},
    {"type": "file", "file": {"file_data": CLIP_DATA, "format": "video/mp4"}},
]


def test_clients_may_spell_a_video_in_many_ways(http: httpx.Client) -> None:
    wanted = ask(http, clip(max_tokens=150), WHAT)
    for part in SPELLINGS:
        got = ask(http, {**part, "max_tokens": 150}, WHAT)
        assert text(got) == text(wanted)
        assert got["video_details"][0]["tokens"] == wanted["video_details"][0]["tokens"]


def test_an_uploaded_video_is_named_by_its_id(http: httpx.Client) -> None:
    stored = http.post(
        "/v1/files", data={"purpose": "user_data"}, files={"file": ("clip.mp4", CLIP)}
    ).raise_for_status()
    file_id = stored.json()["id"]
    wanted = text(ask(http, clip(), WHAT))
    assert text(ask(http, {"type": "file", "file": {"file_id": file_id}}, WHAT)) == wanted
    assert text(ask(http, {"type": "video_url", "video_url": {"file_id": file_id}}, WHAT)) == wanted
    http.delete(f"/v1/files/{file_id}").raise_for_status()  # other tests list the files
    bad = http.post(
        "/v1/files", data={"purpose": "user_data"}, files={"file": ("clip.mp4", CLIP[:500])}
    )
    assert bad.json()["error"]["code"] == "invalid_video"


def test_other_apis_take_videos(http: httpx.Client) -> None:
    wanted = ask(http, clip(), WHAT)["usage"]["prompt_tokens_details"]["video_tokens"]
    question = {"type": "input_text", "text": "What moves?"}
    for part in (
        {"type": "input_file", "file_data": CLIP_URL, "filename": "clip.mp4"},
        {"type": "input_file", "file_data": CLIP_DATA},
        {"type": "input_video", "video_url": CLIP_URL},
    ):
        given = {"model": MODEL, "input": [{"role": "user", "content": [part, question]}]}
        answer = http.post("/v1/responses", json={**given, "max_output_tokens": 8})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["input_tokens_details"]["video_tokens"] == wanted
    source = {"type": "base64", "media_type": "video/mp4", "data": CLIP_DATA}
    for kind in ("document", "video"):
        block = {"type": kind, "source": source}
        messages = user(block, WHAT)
        answer = http.post(
            "/v1/messages", json={"model": MODEL, "messages": messages, "max_tokens": 8}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["video_tokens"] == wanted


def test_options_must_fit_the_kind_of_the_file(http: httpx.Client) -> None:
    video, picture = {"file_data": CLIP_DATA}, {"file_data": data_url(encode(shape("red")))}
    assert refusal(http, {"type": "file", "file": {**video, "pages": "1"}})[0] == "invalid_file"
    assert refusal(http, {"type": "file", "file": {**picture, "fps": 2}})[0] == "invalid_file"

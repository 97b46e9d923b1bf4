"""Videos on the server's own path: the same answers as by vLLM's, caps, caches and details."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests import encoded_videos
from tests.pictures import data_url, encode, image_part, shape, text_part, user
from tests.scrape import scrape, value

MODEL = "saccade-tiny"
WHAT = text_part("What moves in the video?")
CLIP = encoded_videos.video("h264", "mp4", 75, (320, 240))  # 3 s
OTHER = encoded_videos.video("vp9", "matroska", 50, (256, 256))


def clip(data: bytes = CLIP, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4"), **options}}


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


def test_answers_equal_those_by_vllms_own_way(http: httpx.Client) -> None:
    """A client's name for a video leaves it to vLLM."""
    before = decoded(http)
    for data, name in ((CLIP, "one"), (OTHER, "two")):
        theirs = ask(http, {**clip(data), "uuid": name}, WHAT)
        assert decoded(http) == before
        ours = ask(http, clip(data), WHAT)
        before += 1
        assert decoded(http) == before
        assert text(ours) == text(theirs)


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


def test_a_video_that_vllm_preprocesses_takes_no_options(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": user({**clip(num_frames=2), "uuid": "three"}, WHAT)}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "messages[0].content[0].video_url"
    assert "beside a uuid" in error["message"]

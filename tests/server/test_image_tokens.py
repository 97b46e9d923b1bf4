"""Image tokens are predictable before a request, limited by caps, and reported in every answer."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from openai import OpenAI

from tests import families
from tests.conftest import Server
from tests.media import file_part, gif, lettered, pdf
from tests.pictures import (
    TOKEN_PIXELS,
    data_url,
    encode,
    image_part,
    photo,
    shape,
    text_part,
    user,
)
from tests.server.conftest import A
from tests.starts import template

MODEL = "saccade-tiny"
WHAT = text_part("What is in the image?")
LARGE = encode(photo((1600, 1200), 7), "JPEG", quality=88)
SMALL = encode(shape("red"))
SMALL_TOKENS = (224 // TOKEN_PIXELS) ** 2


def ask(http: httpx.Client, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": user(*parts), "max_tokens": 4, "temperature": 0, **more}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def cost(http: httpx.Client, *parts: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """The rows that `/v1/images/tokens` returns for images."""
    response = http.post("/v1/images/tokens", json={"messages": user(*parts), **more})
    assert response.status_code == 200, response.text
    rows: list[dict[str, Any]] = response.json()["data"]
    return rows


def refusal(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def capped(data: bytes, **options: Any) -> dict[str, Any]:
    part = image_part(data)
    part["image_url"].update(options)
    return part


def test_usage_reports_image_tokens(http: httpx.Client) -> None:
    usage = ask(http, image_part(SMALL), WHAT)["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == SMALL_TOKENS
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert usage["prompt_tokens"] > SMALL_TOKENS
    text_only = ask(http, text_part("hello"))["usage"]["prompt_tokens_details"]
    assert (text_only["image_tokens"], text_only["cached_tokens"]) == (0, 0)


def test_a_cap_limits_image_tokens(http: httpx.Client) -> None:
    for tokens in (1, 7, 16, 100, 250):
        usage = ask(http, capped(LARGE, max_tokens=tokens), WHAT)["usage"]
        assert 0 < usage["prompt_tokens_details"]["image_tokens"] <= tokens
    full = ask(http, image_part(LARGE), WHAT)["usage"]["prompt_tokens_details"]["image_tokens"]
    assert full > 250


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_only_detail_low_limits_image_tokens(http: httpx.Client, detail: str) -> None:
    usage = ask(http, capped(LARGE, detail=detail), WHAT)["usage"]
    tokens = usage["prompt_tokens_details"]["image_tokens"]
    full = ask(http, image_part(LARGE), WHAT)["usage"]["prompt_tokens_details"]["image_tokens"]
    assert tokens <= 256 if detail == "low" else tokens == full


def test_the_views_of_a_picture_are_told_on_request(http: httpx.Client) -> None:
    sizes = [{"width": 448, "height": 336}, {"width": 1600, "height": 1200, "max_tokens": 20}]
    body = {"images": sizes, "include_views": True}
    rows = http.post("/v1/images/tokens", json=body).raise_for_status().json()["data"]
    assert rows[0]["views"] == [
        {
            "kind": "whole",
            "region": [0, 0, 448, 336],
            "width": 448,
            "height": 320,
            "columns": 14,
            "rows": 10,
            "tokens": 140,
        }
    ]
    for row in rows:
        (view,) = row["views"]
        assert row["patch_size"] == 16
        assert view["columns"] * view["rows"] == view["tokens"] == row["tokens"]
        assert row["prompt_tokens"] >= row["tokens"]
    few = {"images": sizes[:1] * 65, "include_views": True}
    assert refusal(http, "/v1/images/tokens", few)["param"] == "include_views"
    wrong = {"images": sizes, "include_views": "perhaps"}
    assert refusal(http, "/v1/images/tokens", wrong)["param"] == "include_views"


def test_the_predicted_cost_equals_the_actual_cost(http: httpx.Client) -> None:
    parts = [
        image_part(SMALL), capped(LARGE, max_tokens=90), capped(LARGE, detail="low"),
        image_part(encode(photo((300, 2000), 1), "WEBP")),
    ]  # fmt: skip
    before = cost(http, *parts)
    answer = ask(http, *parts, WHAT, include_image_details=True)
    after = answer["image_details"]
    for row in after:
        del row["cached"]
    more = ("prompt_tokens", "kv_bytes")
    assert [{key: row[key] for key in row if key not in more} for row in before] == after
    total = answer["usage"]["prompt_tokens_details"]["image_tokens"]
    assert total == sum(row["tokens"] for row in before)
    assert all(row["kv_bytes"] % row["tokens"] == 0 for row in before)


def test_the_cost_of_a_size_is_predicted_without_an_image(http: httpx.Client) -> None:
    sizes = [{"width": 224, "height": 224}, {"width": 4000, "height": 3000, "max_tokens": 50}]
    response = http.post("/v1/images/tokens", json={"images": sizes})
    rows = response.json()["data"]
    assert rows[0]["tokens"] == SMALL_TOKENS
    assert 30 <= rows[1]["tokens"] <= 50
    assert response.json()["usage"]["image_tokens"] == rows[0]["tokens"] + rows[1]["tokens"]


def test_a_cost_request_without_usable_images_is_refused(http: httpx.Client) -> None:
    assert refusal(http, "/v1/images/tokens", {})["param"] == "messages"
    named = {"type": "image_url", "image_url": None, "uuid": "nobody"}
    error = refusal(http, "/v1/images/tokens", {"messages": user(named)})
    assert error["param"] == "messages[0].content[0].uuid"
    error = refusal(http, "/v1/images/tokens", {"images": [{"width": 0, "height": 3}]})
    assert "images" in error["message"]


@pytest.mark.parametrize(
    "unfit",
    [{"width": 200_000, "height": 10}, {"width": 30_000, "height": 30_000}],
)
def test_a_size_that_is_refused_is_named(http: httpx.Client, unfit: dict[str, int]) -> None:
    sizes = [{"width": 224, "height": 224}, unfit]
    response = http.post("/v1/images/tokens", json={"images": sizes})
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["param"] == "images[1]"


def test_a_request_budget_is_divided_by_image_area(http: httpx.Client) -> None:
    parts = [image_part(LARGE), image_part(SMALL), image_part(encode(photo((800, 600), 3)))]
    details = ask(http, *parts, WHAT, max_image_tokens=300, include_image_details=True)[
        "image_details"
    ]
    large, small, middle = (row["tokens"] for row in details)
    assert large + small + middle <= 300
    assert large >= middle >= small > 0
    error = refusal(
        http,
        "/v1/chat/completions",
        {"model": MODEL, "messages": user(*parts, WHAT), "max_image_tokens": 2},
    )
    assert (error["code"], error["param"]) == ("image_token_cap", "max_image_tokens")


def test_image_details_report_sizes_and_caching(http: httpx.Client) -> None:
    picture = encode(photo((1000, 700), 99), "JPEG", exif=_orientation(6))
    first = ask(http, image_part(picture), WHAT, include_image_details=True)["image_details"]
    again = ask(http, image_part(picture), WHAT, include_image_details=True)["image_details"]
    (row,), (row_again,) = first, again
    assert (row["width"], row["height"]) == (700, 1000)  # upright
    assert row["processed_width"] % TOKEN_PIXELS == 0
    assert row["processed_height"] % TOKEN_PIXELS == 0
    expected = row["processed_width"] * row["processed_height"] // TOKEN_PIXELS**2
    assert row["tokens"] == expected
    assert row["region"] == [0, 0, 700, 1000]
    assert (row["cached"], row_again["cached"]) == ("none", "embedding")


def _orientation(value: int) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = value
    return exif.tobytes()


def test_boxes_map_back_to_the_original_image(http: httpx.Client, repository: Path) -> None:
    path = repository / "clients" / "examples" / "boxes.py"
    spec = importlib.util.spec_from_file_location("boxes", path)
    assert spec is not None
    assert spec.loader is not None
    boxes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boxes)
    (row,) = ask(http, capped(LARGE, max_tokens=100), WHAT, include_image_details=True)[
        "image_details"
    ]
    left, top, right, bottom = 400, 300, 1200, 900  # in the original
    across, down = row["processed_width"] / 1600, row["processed_height"] / 1200
    processed = (left * across, top * down, right * across, bottom * down)
    assert boxes.to_original(processed, row) == pytest.approx((left, top, right, bottom))
    per_mille = (250, 250, 750, 750)
    assert boxes.to_original(per_mille, row, scale=1000) == pytest.approx((400, 300, 1200, 900))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat/completions", "responses", "messages"])
def test_boxes_of_an_answer_are_in_pixels_of_the_original(
    http: httpx.Client, route: str, stream: bool
) -> None:
    """The demo model writes thousandths; the picture is shown at a quarter of its size."""
    picture = shape("red", size=(1792, 896))
    part = capped(encode(picture), max_tokens=98)
    text = "Give the bounding box of the red circle."
    body: dict[str, Any] = {"messages": user(part, text_part(text)), "max_tokens": 40}
    if route == "responses":
        parts = [{**part, "type": "input_image"}, {"type": "input_text", "text": text}]
        body = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 40}
    elif route == "messages":
        source = {"type": "base64", "data": base64.b64encode(encode(picture)).decode()}
        image = {"type": "image", "source": source, "max_tokens": 98}
        body["messages"] = user(image, text_part(text))
    more = {"model": MODEL, "temperature": 0, "stream": stream, "include_grounding": True}
    response = http.post(f"/v1/{route}", json={**body, **more})
    assert response.status_code == 200, response.text
    if stream:
        lines = [line[6:] for line in response.text.split("\n") if line[:7] == "data: {"]
        events = [event for event in map(json.loads, lines) if "grounding" in json.dumps(event)]
        (answer,) = (event.get("response", event) for event in events)
    else:
        answer = response.json()
    (place,) = answer["grounding"]
    assert "image_details" not in answer
    expected = picture.convert("L").point(lambda level: 255 * (level < 200)).getbbox()
    assert place["box"] == pytest.approx(expected, abs=80)
    assert place["box"] == pytest.approx(
        [
            number * side / 1000
            for number, side in zip(place["numbers"], (1792, 896) * 2, strict=True)
        ],
        abs=0.01,
    )


def two_shapes() -> Any:
    """A red circle and a blue square, far from each other on a white page."""
    from PIL import Image

    page = Image.new("RGB", (1600, 1200), "white")
    page.paste(shape("red", size=(128, 128)), (100, 64))
    page.paste(shape("blue", "square", size=(128, 128)), (1400, 1000))
    return page


def test_a_page_may_be_shown_without_its_margins(http: httpx.Client) -> None:
    page = two_shapes().crop((0, 0, 1300, 1200))
    for data in (encode(page), encode(page, "JPEG", quality=95)):
        part = capped(data, detail="trim")
        (before,) = cost(http, part, include_views=True)
        answer = ask(http, part, WHAT, include_image_details=True, max_tokens=8)
        (row,) = answer["image_details"]
        assert {key: before[key] for key in row if key != "cached"} == {
            key: row[key] for key in row if key != "cached"
        }
        assert (row["width"], row["height"]) == (1300, 1200)
        left, top, right, bottom = row["region"]
        assert 0 < left < 132 < 196 < right < 300
        assert 0 < top < 96 < 160 < bottom < 300
        assert row["tokens"] < 20
        assert before["views"][0]["region"] == row["region"]
        assert answer["choices"][0]["message"]["content"] == "a red circle"


def test_a_page_may_be_shown_as_crops_after_the_whole(http: httpx.Client) -> None:
    part = capped(encode(two_shapes()), detail="salient")
    rows = ask(http, part, WHAT, include_image_details=True)["image_details"]
    overview, circle, square = rows
    assert {(row["width"], row["height"]) for row in rows} == {(1600, 1200)}
    assert overview["region"] == [0, 0, 1600, 1200]
    assert circle["region"][2] < 300
    assert square["region"][0] > 1300
    (whole,) = cost(http, capped(encode(two_shapes())))
    assert sum(row["tokens"] for row in rows) < 0.4 * whole["tokens"]
    low = cost(http, capped(encode(two_shapes()), detail="salient", max_tokens=30))
    assert sum(row["tokens"] for row in low) <= 30
    again = ask(http, part, WHAT, include_image_details=True)["image_details"]
    assert {row["cached"] for row in again} == {"embedding"}
    text = text_part("Give the bounding box of the blue square.")
    body = {"include_grounding": {"image": 2}, "max_tokens": 40}
    for place in ask(http, part, text, **body)["grounding"]:
        assert place["box"][0] > 1300


def test_blank_pages_of_a_pdf_take_few_tokens_where_asked(http: httpx.Client) -> None:
    document = pdf((400, 300), (400, 300))
    rows = cost(http, file_part(document, detail="trim"))
    assert [row["tokens"] <= 16 for row in rows] == [True, True]
    assert all(row["tokens"] > 100 for row in cost(http, file_part(document)))


def test_the_text_of_a_page_is_in_the_prompt_where_asked(http: httpx.Client) -> None:
    prompts = []
    for file in (lettered("Hamburgefonts"), pdf((200, 80))):
        for asked in (False, True):
            messages = user(file_part(file, include_text=asked), WHAT)
            body = {"model": MODEL, "messages": messages, "return_token_strs": True}
            response = http.post("/tokenize", json=body)
            assert response.status_code == 200, response.text
            prompts.append(response.json()["token_strs"])
    without, with_text, blank, blank_with_text = prompts
    assert len(with_text) > len(without)
    assert blank == blank_with_text
    answer = ask(http, file_part(lettered("Hamburgefonts"), include_text=True), WHAT)
    assert answer["usage"]["prompt_tokens"] == len(with_text)


def test_control_words_in_the_text_of_a_page_are_text(http: httpx.Client) -> None:
    page = lettered("<|im_end|> <|im_start|>")
    controls = []
    for asked in (False, True):
        messages = user(file_part(page, include_text=asked, max_tokens=8), WHAT)
        body = {"model": MODEL, "messages": messages, "return_token_strs": True}
        words = http.post("/tokenize", json=body).json()["token_strs"]
        controls.append([word for word in words if word.startswith("<|")])
    assert controls[0] == controls[1]


def test_an_option_of_grounding_that_does_not_fit_is_named(http: httpx.Client) -> None:
    for value, param in ((2, ""), ({"scale": "mm"}, ".scale"), ({"image": 1}, ".image")):
        body = {"model": MODEL, "messages": user(image_part(SMALL), WHAT)}
        error = refusal(http, "/v1/chat/completions", {**body, "include_grounding": value})
        assert error["param"] == f"include_grounding{param}"


def test_a_stream_ends_with_image_token_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user(image_part(SMALL), WHAT),  # type: ignore[arg-type]
        stream=True,
        max_tokens=3,
        extra_body={"include_image_details": True},
    )
    chunks = list(stream)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.model_dump()["image_tokens"] == SMALL_TOKENS
    extra = chunks[-1].model_extra
    assert extra is not None
    assert [row["tokens"] for row in extra["image_details"]] == [SMALL_TOKENS]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip()


@pytest.mark.parametrize("stream", [False, True])
def test_responses_report_image_tokens(http: httpx.Client, stream: bool) -> None:
    part = {"type": "input_image", "image_url": data_url(LARGE, "image/jpeg"), "detail": "low"}
    content = [part, {"type": "input_text", "text": "What is in the image?"}]
    body = {
        "model": MODEL, "input": [{"role": "user", "content": content}], "max_output_tokens": 3,
        "stream": stream, "include_image_details": True,
    }  # fmt: skip
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    if stream:
        events = [
            json.loads(line[6:]) for line in response.text.split("\n") if line[:7] == "data: {"
        ]
        answer = events[-1]["response"]
    else:
        answer = response.json()
    assert 100 < answer["usage"]["input_tokens_details"]["image_tokens"] <= 256
    assert answer["image_details"][0]["width"] == 1600


def message_about_a_picture(server: Server, *, stream: bool) -> Any:
    """The answer, or the event with the usage, of a picture that is capped at 16 tokens."""
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(SMALL).decode()}
    image: Any = {"type": "image", "source": source, "max_tokens": 16}
    with anthropic.Anthropic(base_url=server.url, auth_token=A) as client:
        answer: Any = client.messages.create(
            model=MODEL,
            max_tokens=3,
            messages=[{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}],
            extra_body={"include_image_details": True},
            stream=stream,
        )
        if stream:
            *_, answer, _ = answer
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_messages_report_image_tokens(server: Server, stream: bool) -> None:
    answer = message_about_a_picture(server, stream=stream)  # vLLM looks for tool calls in it
    assert answer.usage.output_tokens == 3
    assert answer.usage.model_extra["image_tokens"] == 16
    assert answer.model_extra["image_details"][0]["tokens"] == 16


def test_streams_of_messages_report_image_tokens(guarded: Server) -> None:
    event = message_about_a_picture(guarded, stream=True)
    assert event.usage.output_tokens == 3
    assert event.usage.model_extra["image_tokens"] == 16
    assert event.model_extra["image_details"][0]["tokens"] == 16


def test_tokenize_counts_capped_images(http: httpx.Client) -> None:
    counts = []
    for part in (image_part(SMALL), capped(SMALL, max_tokens=16)):
        response = http.post("/tokenize", json={"model": MODEL, "messages": user(part, WHAT)})
        counts.append(response.json()["count"])
    assert counts[0] - counts[1] == SMALL_TOKENS - 16


def test_an_image_sent_by_uuid_can_be_capped(http: httpx.Client) -> None:
    ask(http, image_part(SMALL, uuid="the-red-one"), WHAT)
    ask(http, capped(SMALL, max_tokens=16), WHAT)  # so that the capped image is cached
    named = {"type": "image_url", "image_url": None, "uuid": "the-red-one", "max_tokens": 16}
    usage = ask(http, named, WHAT)["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 16


def test_each_page_of_a_pdf_is_an_image(http: httpx.Client) -> None:
    """A page side of 112 points is 224 pixels at 144 dpi."""
    document = pdf((112, 112), (112, 112), (112, 112), color="red")
    answer = ask(http, file_part(document), WHAT, include_image_details=True)
    assert [row["frame"] for row in answer["image_details"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 3 * SMALL_TOKENS
    chosen = ask(http, file_part(document, pages="2", max_tokens=20), WHAT)
    assert chosen["usage"]["prompt_tokens_details"]["image_tokens"] == 16


def test_the_chosen_pdf_page_is_the_one_answered_about(http: httpx.Client) -> None:
    """The demo model names the shape on the chosen page."""
    import io

    pages = [shape(color, size=(224, 224)) for color in ("red", "blue", "green")]
    file = io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:], resolution=144)
    for page, color in enumerate(("red", "blue", "green"), 1):
        part = file_part(file.getvalue(), pages=str(page))
        answer = ask(http, part, WHAT, max_tokens=8)
        assert answer["choices"][0]["message"]["content"] == f"a {color} circle"


@pytest.mark.parametrize("route", ["responses", "messages"])
def test_every_api_accepts_pdfs(http: httpx.Client, route: str) -> None:
    url = data_url(pdf((112, 112), (112, 112)), "application/pdf")
    if route == "responses":
        part: Any = {"type": "input_file", "file_data": url, "filename": "two.pdf"}
        text = {"type": "input_text", "text": "What?"}
        body: Any = {"input": [{"role": "user", "content": [part, text]}], "max_output_tokens": 3}
    else:
        data = url.partition(",")[2]
        source = {"type": "base64", "media_type": "application/pdf", "data": data}
        part = {"type": "document", "source": source}
        body = {"messages": user(part, text_part("What?")), "max_tokens": 3}
    response = http.post(f"/v1/{route}", json={"model": MODEL, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    tokens = usage.get("input_tokens_details", usage)["image_tokens"]
    assert tokens == 2 * SMALL_TOKENS


def test_frames_of_an_animation_become_images(http: httpx.Client) -> None:
    details = ask(http, capped(gif(10), frames=3), WHAT, include_image_details=True)[
        "image_details"
    ]
    assert [row["frame"] for row in details] == [0, 4, 9]


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        (capped(SMALL, max_tokens=0), "invalid_request", "image_url.max_tokens"),
        (capped(SMALL, detail="medium"), "invalid_request", "image_url.detail"),
        (capped(gif(3), frames=[3]), "image_frame_missing", "image_url"),
        (capped(gif(3), frames=[10**18]), "image_frame_missing", "image_url"),
        (capped(gif(3), frames=[10**30]), "invalid_request", "image_url.frames[0]"),
        (file_part(pdf((9, 9)), pages="2"), "image_frame_missing", "file"),
        (file_part(b"%PDF-1.4"), "invalid_file", "file"),
        ({**image_part(pdf((9, 9))), "uuid": "U"}, "invalid_file", "image_url"),
    ],
)
def test_an_unusable_image_is_refused_with_its_param(
    http: httpx.Client, part: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": MODEL, "messages": user(WHAT, part), "max_tokens": 4}
    error = refusal(http, "/v1/chat/completions", body)
    assert (error["code"], error["param"]) == (code, f"messages[0].content[1].{param}")


def test_too_many_images_are_refused(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": user(*[image_part(SMALL)] * 129, WHAT), "max_tokens": 4}
    assert refusal(http, "/v1/chat/completions", body)["code"] == "too_many_images"


# Options that a client of a server with --trust-request-mm-kwargs may send: {JSON: `param`}.
BAD_OPTIONS = {
    '{"mm_processor_kwargs": {"max_pixels": NaN}}': None,
    '{"mm_processor_kwargs": {"max_pixels": 36893488147419103232}}': (
        "mm_processor_kwargs.max_pixels"
    ),
    '{"mm_processor_kwargs": {"x": "\\ud800"}}': None,
    '{"media_io_kwargs": {"image": {"image_mode": "infrared"}}}': (
        "media_io_kwargs.image.image_mode"
    ),
    '{"media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 256]}}}': (
        "media_io_kwargs.image.rgba_background_color"
    ),
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_invalid_processor_options_are_refused_with_their_param(
    tight: Server, options: str
) -> None:
    body = json.dumps({"model": MODEL, "messages": user(image_part(SMALL))})
    answer = httpx.post(
        f"{tight.url}/v1/chat/completions",
        content=f"{body[:-1]}, {options[1:]}",
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == BAD_OPTIONS[options], answer.text


def test_a_cap_below_the_models_minimum_stops_the_start_up(tmp_path: Path) -> None:
    """LLaVA-1.5 uses a fixed number of tokens for every image, here 64."""
    model = families.build("llava", tmp_path)
    flags = ["--port", "0", "--max-image-tokens", "5"]
    done = template().run("tests.starts:saccade", "serve", str(model), *flags)
    assert done.returncode == 1
    assert "cannot start" in done.stderr
    assert "at least 64 tokens for this image, and the cap is 5" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_agrees_with_the_running_engine(http: httpx.Client, server: Server) -> None:
    """Its requests at once are what vLLM computed for its longest request, and its image tokens
    those of the API."""
    info = re.search(r"^vllm:cache_config_info{(.*)} ", http.get("/metrics").text, re.M)
    assert info is not None
    engine = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
    words = ["--gpu", "l4", "--dtype", "float32", "--block-size", engine["block_size"]]
    length = int(http.get("/v1/models").json()["data"][0]["max_model_len"])
    request = ["--image", "500x300", "--prompt", "1000", "--output", "1"]
    answer = http.post("/v1/images/tokens", json={"images": [{"width": 500, "height": 300}]}).json()
    tokens = answer["data"][0]["prompt_tokens"]
    request[-1] = str(length - tokens - 1000)
    memory = ["--kv-cache-memory-bytes", str(1 << 30)]
    command = [sys.executable, "-m", "server", "plan", *words, *request, *memory, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    plan = json.loads(done.stdout)["plans"][0]
    assert plan["image_tokens"] == tokens
    assert plan["tokens"] == length
    assert plan["concurrency"] == pytest.approx(float(engine["kv_cache_max_concurrency"]), abs=1e-9)

"""Media parts as clients send them, including odd and hostile ones, over HTTP."""

import base64
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote_from_bytes

import httpx
import pytest

from tests import hostile_pdfs
from tests.conftest import Origin, Server
from tests.media import file_part, pdf
from tests.pictures import (
    data_url,
    encode,
    image_part,
    photo,
    series_url,
    shape,
    text_part,
    user,
    video_part,
)
from tests.scrape import FRESH

MODEL = "saccade-tiny"
WHAT = text_part("What color is the shape?")
RED, BLUE = (encode(shape(color)) for color in ("red", "blue"))
LARGE = encode(
    photo((240, 240), 3), "PNG"
)  # large enough to be taken out of the body before parsing
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
ROOTS = {CHAT: "messages", MESSAGES: "messages", RESPONSES: "input", "/tokenize": "messages"}


def post(http: httpx.Client, path: str, *parts: Any, role: str = "user", **more: Any) -> Any:
    body: dict[str, Any] = {"model": MODEL, ROOTS[path]: [{"role": role, "content": list(parts)}]}
    if path == MESSAGES:
        body["max_tokens"] = 8
    return http.post(path, json={**body, "temperature": 0, **more})


def answer(http: httpx.Client, *parts: Any, **more: Any) -> str:
    response = post(http, CHAT, *parts, WHAT, **more)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error of a 4xx, after a check that its message shows no library internals."""
    assert 400 <= response.status_code < 500, response.text
    error: dict[str, Any] = response.json()["error"]
    for word in ("Traceback", "numpy", "array(", "pydantic", "vllm", "<class", "errors.pydantic"):
        assert word not in error["message"]
    assert len(error["message"]) < 400
    return error


@pytest.fixture
def internal() -> Iterator[tuple[str, list[str]]]:
    """A URL that the server must not open, and the peers that connected to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        seen: list[str] = []
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/secret.png", seen
        try:
            while True:
                connection, peer = listener.accept()
                seen.append(str(peer))
                connection.close()
        except TimeoutError:
            pass
    assert seen == []


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("more", [{}, {"uuid": "U"}, {"type": None}])
@pytest.mark.parametrize("key", ["image_pil", "image_embeds", "audio_embeds", "video_embeds"])
def test_vllms_python_only_parts_are_refused_and_not_fetched(
    http: httpx.Client, internal: tuple[str, list[str]], path: str, more: dict[str, Any], key: str
) -> None:
    part = {"type": key, key: internal[0], **more}
    error = refusal(post(http, path, part, WHAT))
    assert error["param"] == "messages[0].content[0].type"


def test_a_url_outside_a_media_part_is_not_fetched(
    http: httpx.Client, internal: tuple[str, list[str]]
) -> None:
    text = {"type": "text", "text": "hi", "uuid": "U", "image_url": internal[0]}
    assert answer(http, text)
    body = {"model": MODEL, "messages": user(text_part("hi")), "max_tokens": 2}
    hidden = {"type": "image_url", "image_url": internal[0]}
    response = http.post(CHAT, json={**body, "metadata": {"a": hidden}, "documents": [hidden]})
    assert response.status_code < 500


def test_tool_arguments_are_not_treated_as_media(http: httpx.Client) -> None:
    arguments = {"image_url": "https://cdn.example.com/a.png", "detail": "full", "frames": 3}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": arguments}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "done"}
    body = {
        "model": MODEL,
        "max_tokens": 8,
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ],
    }
    response = http.post(MESSAGES, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4,plain"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": None, "text": "a"},
        {"type": "image_url", "image_url": {"url": 5}, "uuid": "U"},
        {"type": "image_url", "image_url": {"url": ""}, "uuid": "U"},
        {"type": "image_url", "uuid": "never sent"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@@"}},
        {"type": "hologram"},
    ],
)
def test_an_invalid_part_is_refused_with_its_param(
    http: httpx.Client, part: dict[str, Any]
) -> None:
    error = refusal(post(http, CHAT, image_part(RED), part, WHAT))
    assert (error["param"] or "").startswith("messages[0].content[1].")


@pytest.mark.parametrize("source", [None, "x", {"type": "base64", "data": ""}])
@pytest.mark.parametrize("nested", [True, False])
def test_an_invalid_anthropic_source_is_refused_with_its_param(
    http: httpx.Client, source: Any, nested: bool
) -> None:
    block: dict[str, Any] = {"type": "image", "source": source}
    if nested:
        block = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    error = refusal(post(http, MESSAGES, block, WHAT))
    assert "source" in error["param"]


def test_a_lone_surrogate_is_refused(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "messages": user(image_part(RED, uuid="\ud800"))})
    response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert "not valid JSON" in refusal(response)["message"]


def test_an_error_names_the_faulty_part_among_similar_ones(http: httpx.Client) -> None:
    """Not another part with the same URL, and not a part whose URL ends with the faulty uuid."""
    bad = {"type": "image_url", "image_url": {"url": data_url(RED[:20])}}
    error = refusal(post(http, CHAT, image_part(RED), bad, bad, WHAT))
    assert error["param"] == "messages[0].content[1].image_url"
    tail = data_url(RED)[-12:]
    unknown = {"type": "image_url", "image_url": None, "uuid": tail}
    error = refusal(post(http, CHAT, image_part(RED), unknown, WHAT))
    assert error["param"] == "messages[0].content[1].uuid"


# ---------------------------------------------------------------------- what clients send


ENCODINGS = {
    "line breaks": "data:image/png;base64," + base64.encodebytes(LARGE).decode(),
    "surrounding whitespace": "  " + data_url(LARGE) + "\n",
    "no padding": data_url(LARGE).rstrip("="),
    "url-safe": "data:image/png;base64," + base64.urlsafe_b64encode(LARGE).decode(),
    "percent-encoded": "data:image/png," + quote_from_bytes(LARGE),
    "parameters": "data:image/png;name=a.png;base64," + base64.b64encode(LARGE).decode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_of_a_data_url_gives_the_same_image(
    http: httpx.Client, encoding: str
) -> None:
    whole = answer(http, image_part(LARGE), include_image_details=True)
    part = {"type": "image_url", "image_url": {"url": ENCODINGS[encoding]}}
    response = post(http, CHAT, part, WHAT, include_image_details=True)
    assert response.status_code == 200, response.text
    (details,) = response.json()["image_details"]
    assert (details["width"], details["cached"] != "none") == (240, True)  # the same bytes
    assert response.json()["choices"][0]["message"]["content"] == whole


@pytest.mark.parametrize("data", [RED, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("as_url", [True, False])
def test_anthropic_image_data_is_accepted_at_every_size(
    http: httpx.Client, data: bytes, as_url: bool
) -> None:
    text = data_url(data) if as_url else base64.b64encode(data).decode()
    source = {"type": "base64", "media_type": "image/png", "data": text}
    response = post(http, MESSAGES, {"type": "image", "source": source}, WHAT)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("detail", [None, "auto", "original"])
def test_detail_and_unknown_keys_are_accepted_in_every_dialect(
    http: httpx.Client, detail: str | None
) -> None:
    url = data_url(RED)
    chat = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
    assert "red" in answer(http, {**chat, "prompt_cache_breakpoint": True, "unknown": [1]})
    given = {"type": "input_image", "image_url": url, "detail": detail}
    answers = [
        post(http, RESPONSES, given, {"type": "input_text", "text": WHAT["text"]}),
        post(http, RESPONSES, {"type": "input_image", "image_url": url}),
        post(http, MESSAGES, {"type": "image", "detail": detail, "source": {
            "type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}}),
    ]  # fmt: skip
    assert [each.status_code for each in answers] == [200] * 3, [each.text for each in answers]


def test_a_pdf_as_image_and_an_image_as_file_are_accepted(http: httpx.Client) -> None:
    page = pdf((200, 200), color="red")
    as_image = {"type": "image_url", "image_url": {"url": data_url(page, "application/pdf")}}
    as_file = file_part(RED)
    for part in (as_image, as_file):
        response = post(http, CHAT, part, WHAT, include_image_details=True)
        assert response.status_code == 200, response.text
        assert len(response.json()["image_details"]) == 1


@pytest.mark.parametrize(
    "data",
    [hostile_pdfs.nested_forms(), hostile_pdfs.odd()["form that draws itself"]],
    ids=["nested forms", "a form that draws itself"],
)
def test_a_pdf_page_that_takes_too_much_work_is_refused(http: httpx.Client, data: bytes) -> None:
    error = refusal(post(http, CHAT, WHAT, file_part(data)))
    assert error["code"] == "pdf_too_complex"
    assert error["param"] == "messages[0].content[1].file"
    assert answer(http, image_part(RED)) == answer(http, image_part(RED))


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1)])
def test_a_picture_of_one_pixel_is_answered(http: httpx.Client, size: tuple[int, int]) -> None:
    assert answer(http, image_part(encode(shape("red", size=size))))


@pytest.mark.parametrize("name", ["page tree loop", "deep page tree", "MediaBox 0 0 1e9 1e9"])
def test_odd_pdfs_are_shown_or_refused(http: httpx.Client, name: str) -> None:
    response = post(http, CHAT, WHAT, file_part(hostile_pdfs.odd()[name]))
    if response.status_code != 200:
        assert refusal(response)["param"] == "messages[0].content[1].file"


def test_anthropic_text_documents_are_read(http: httpx.Client) -> None:
    for source in (
        {"type": "text", "media_type": "text/plain", "data": "a text"},
        {"type": "content", "content": "a text"},
        {"type": "content", "content": [{"type": "text", "text": "a text"}]},
    ):
        response = post(http, MESSAGES, {"type": "document", "source": source, "title": "T"}, WHAT)
        assert response.status_code == 200, response.text
        plain = post(http, MESSAGES, text_part("T"), text_part("a text"), WHAT)
        assert response.json()["usage"]["input_tokens"] == plain.json()["usage"]["input_tokens"]


def test_images_in_anthropic_system_prompts_are_refused(http: httpx.Client) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": data_url(RED).split(",")[1]}
    system = [{"type": "image", "source": source}]
    assert refusal(post(http, MESSAGES, WHAT, system=system))["param"] == "system[0]"
    body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "system", "content": system}]}
    assert refusal(http.post(MESSAGES, json=body))["param"] == "messages[0].content[0]"


def test_a_picture_dropped_by_the_template_is_refused_with_its_param(http: httpx.Client) -> None:
    """vLLM merges several system and developer messages into one, and drops their pictures."""
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [image_part(RED), text_part("look at this")]},
        {"role": "user", "content": [image_part(BLUE), WHAT]},
    ]
    error = refusal(http.post(CHAT, json={"model": MODEL, "messages": messages}))
    assert error["param"] == "messages[1].content[0].image_url"
    assert "user message" in error["message"]
    kept = [{"role": "system", "content": [image_part(RED)]}, {"role": "user", "content": [WHAT]}]
    response = http.post(CHAT, json={"model": MODEL, "messages": kept, "max_tokens": 4})
    assert response.status_code == 200, response.text


def test_a_frame_that_no_processor_takes_is_refused_with_its_param(http: httpx.Client) -> None:
    clip = video_part(series_url(encode(photo((804, 4)), "JPEG")))
    error = refusal(post(http, CHAT, clip, WHAT))
    assert error["param"] == "messages[0].content[0].video_url"
    assert error["code"] == "image_aspect_ratio"


def test_json_escapes_in_keys_are_decoded(http: httpx.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "no"}}
    body = json.dumps({"model": MODEL, "messages": user(part)}).replace(
        "image_url", "im\\u0061ge_url"
    )
    response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert refusal(response)["param"] == "messages[0].content[0].image_url.detail"


def test_a_huge_body_of_numbers_is_refused(http: httpx.Client) -> None:
    body = b'{"messages":[' + b"1," * 6_000_000 + b"1]}"
    response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "besides its images" in refusal(response)["message"]


# ---------------------------------------------------------------------- clients that leave


def test_a_client_that_leaves_cancels_its_concurrent_fetches(
    server: Server, http: httpx.Client, origin: Origin
) -> None:
    parts = []
    for number in range(4):
        path = f"/{number}.png"
        origin.files[path], origin.delay_s[path] = RED, 8.0
        parts.append({"type": "image_url", "image_url": {"url": origin.url + path}})
    before = cancelled_in_fetch(http)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + CHAT, json={"model": MODEL, "messages": user(*parts)}, timeout=1.0)
    assert len(origin.requests) == 4  # all at once
    deadline = time.monotonic() + 5
    while cancelled_in_fetch(http) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cancelled_in_fetch(http) == before + 1


def cancelled_in_fetch(http: httpx.Client) -> float:
    lines = http.get("/metrics", headers=FRESH).text.splitlines()
    name = 'saccade_cancellations_total{stage="fetch"}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

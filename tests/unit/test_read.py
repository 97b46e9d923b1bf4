"""Parsing of request bodies: JSON, options, payloads, and handles in place of media."""

import base64
import json
import random
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ClientError, RequestTooComplex, RequestTooLarge, TooManyImages
from server.request.bounds import BodyBounds, check_text
from server.request.dialects import Found, Slot
from server.request.grounding import GroundingOptions, check_image, of_model
from server.request.media import Inline, MediaLimits
from server.request.payloads import MIN_PAYLOAD_BYTES, Payloads, decode
from server.request.read import ReadRequest
from tests import pictures
from tests.media import CHAT, LIMITS, MAX_JSON_BYTES, chat, prepare, read

DATA = random.Random(23).randbytes(MIN_PAYLOAD_BYTES)
B64 = base64.b64encode(DATA).decode()
URL = "data:image/png;base64," + B64
SMALL = pictures.encode(pictures.shape("red"))
LIMIT = 1 << 30
MESSAGES = "/v1/messages"


def loaded(part: Any, path: str = CHAT, **dump: Any) -> list[bytes]:
    """The bytes of each media part; fails if the small body contains any of them."""
    body = json.dumps(chat(part), **dump).encode()
    found = read(body, path)
    assert len(found.payloads.small) < 1000
    texts = [ref.source.text for ref in found.context.media if isinstance(ref.source, Inline)]
    assert all(isinstance(text, memoryview) for text in texts)
    return [decode(text, LIMIT) for text in texts]


@pytest.mark.parametrize("dump", [{}, {"separators": (",", ":")}, {"indent": 2}])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": "data:image/png;a=b;base64," + B64}},
        {"type": "image_url", "image_url": {"url": " " + URL}},
        {"type": "file", "file": {"file_data": URL}},
        {"type": "file", "file": {"file_data": B64}},
        {"type": "input_audio", "input_audio": {"data": B64, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + B64}},
    ],
)
def test_a_long_payload_is_extracted_and_resolved(part: Any, dump: Any) -> None:
    assert loaded(part, **dump) == [DATA]


@pytest.mark.parametrize("data", [B64, URL])
def test_payloads_of_anthropic_sources_are_extracted(data: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": data}
    assert loaded({"type": "image", "source": source}, MESSAGES) == [DATA]


def test_payloads_with_escaped_line_breaks_and_slashes_are_extracted() -> None:
    lines = base64.encodebytes(DATA).decode()
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + lines}}
    assert loaded(part) == [DATA]
    body = json.dumps(chat(part)).replace("/", "\\/").replace("data:image\\/", "data:image/")
    (ref,) = read(body.encode()).context.media
    assert isinstance(ref.source, Inline)
    assert isinstance(ref.source.text, memoryview)
    assert decode(ref.source.text, LIMIT) == DATA


@pytest.mark.parametrize(
    "document",
    [
        chat({"type": "text", "text": URL}),
        chat({"type": "text", "text": f'he said "{URL}"'}),
        {"prompt": URL},
        {"data": B64},
        {"messages": [{"role": "user", "content": "a"}], "metadata": {"data": B64}},
    ],
)
def test_strings_that_look_like_payloads_are_unchanged(document: Any) -> None:
    found = read(document)
    assert json.loads(found.rewritten()) == document


def test_images_and_lookalikes_in_one_request_are_told_apart() -> None:
    picture = pictures.encode(pictures.photo((120, 120)), "PNG")
    url = pictures.data_url(picture)
    assert len(url) > MIN_PAYLOAD_BYTES
    texts = [{"type": "text", "text": url}, {"type": "image_url", "image_url": {"url": url}}] * 4
    prepared = prepare(chat(*texts))
    content = prepared.content()
    assert [part["text"] == url for part in content[::2]] == [True] * 4
    assert len({part["image_url"]["url"] for part in content[1::2]}) == 4
    assert all(image.data == picture for image in prepared.shown())


def test_many_misplaced_payloads_are_restored_in_one_pass() -> None:
    document = chat(*[{"type": "text", "text": URL}] * 40)
    assert (json.loads(read(document).rewritten()) == document) is True


def test_a_payload_token_sent_by_a_client_is_plain_text() -> None:
    found = read(chat({"type": "image_url", "image_url": {"url": URL}}))
    (token,) = found.payloads._spans
    again = chat({"type": "text", "text": URL}, {"type": "text", "text": token})
    assert json.loads(read(again).rewritten()) == again
    with pytest.raises(ClientError):
        read(chat({"type": "image_url", "image_url": {"url": token}}))


KEYS = st.sampled_from(["image_url", "url", "data", "source", "type", "text"])
VALUES = st.none() | st.text() | st.sampled_from(["<url>", "image", "image_url"])


@given(
    st.recursive(
        VALUES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=25
    )
)
def test_any_document_without_messages_is_unchanged(shape: Any) -> None:
    text = json.dumps(shape).replace("<url>", URL)
    if len(text) < MAX_JSON_BYTES:
        assert (json.loads(read(text.encode()).rewritten()) == json.loads(text)) is True


@pytest.mark.parametrize("before", ["", "a", "a" * MIN_PAYLOAD_BYTES, '\\"' * MIN_PAYLOAD_BYTES])
@pytest.mark.parametrize("length", [MIN_PAYLOAD_BYTES - 1, MIN_PAYLOAD_BYTES])
def test_payloads_of_at_least_the_minimum_length_are_extracted(before: str, length: int) -> None:
    strings = ["data:a/b;base64," + "A" * length, "A" * length]
    body = f'["{before}", "{strings[0]}", {{"data": "{strings[1]}"}}, "{before}"]'.encode()
    found = read(body)
    assert len(found.payloads._spans) == (2 if length >= MIN_PAYLOAD_BYTES else 0)
    assert found.payloads.restored(found.payloads.small) == body


class CountedSearches(bytes):
    """A body that counts how often the scan searches for a quote."""

    count = 0

    def rfind(self, *args: Any) -> int:
        self.count += 1
        return super().rfind(*args)


def test_the_scan_does_not_stop_at_each_quote() -> None:
    body = CountedSearches(b'"' * (10 * MIN_PAYLOAD_BYTES))
    assert Payloads(body).small is body
    assert 10 <= body.count <= 11


# ---------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b"[" * 100, b'{"a": "\xff"}',
     b'{"a": "data:image/png;base64,', b"nul"],
)  # fmt: skip
def test_malformed_json_is_refused(body: bytes) -> None:
    with pytest.raises(ClientError, match="not valid JSON"):
        read(body)


@pytest.mark.parametrize("body", [b"[]", b"5", b'"a"', b"null", b'\xef\xbb\xbf{"a": 1}'])
def test_json_that_is_not_an_object_is_passed_to_the_route(body: bytes) -> None:
    assert read(body).rewritten() == body


def rewritten_with_frames(found: ReadRequest, frames: int) -> bytes:
    """Rewrite `found` below `frames` nested calls."""
    return found.rewritten() if not frames else rewritten_with_frames(found, frames - 1)


def test_json_too_deep_to_rewrite_is_refused() -> None:
    depth = 120
    found = read(b'{"max_image_tokens":1,"a":' + b"[" * depth + b"]" * depth + b"}")
    with pytest.raises(ClientError, match="nested too deeply"):
        rewritten_with_frames(found, sys.getrecursionlimit() - depth - 30)


def test_the_size_of_json_without_the_media_is_limited() -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(2 * MAX_JSON_BYTES)).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    assert len(read(chat(image)).context.media) == 1
    for document in (
        {"messages": [1] * MAX_JSON_BYTES},
        chat({"type": "text", "text": "a" * MAX_JSON_BYTES}),
        chat({"type": "text", "text": url}),  # once restored, it counts
    ):
        with pytest.raises(RequestTooLarge, match=f"more than {MAX_JSON_BYTES} bytes besides"):
            read(document)


TEXT = {"type": "text", "text": "[[[, {{{"}
USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f"}}


def chat_with(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **fields}


@pytest.mark.parametrize(
    ("path", "document", "param"),
    [
        (CHAT, {"messages": [USER] * 2049}, "messages"),
        (CHAT, chat(*[TEXT] * 2048), "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [TEXT] * 3}] * 600},
         "messages[482].content"),
        (CHAT, chat_with(tools=[TOOL] * 2048), "tools"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [TOOL] * 2048}]},
         "messages[0].tool_calls"),
        (CHAT, {"messages": [[1, *[USER] * 2049]]}, "messages[0]"),
        (MESSAGES, {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "content": [TEXT] * 2047}]}]},
         "messages[0].content[0].content"),
        ("/v1/responses", {"input": [USER] * 2049}, "input"),
        ("/v1/completions", {"prompt": ["a"] * 2049}, "prompt"),
        ("/v1/embeddings", {"input": [[1]] * 2049}, "input"),
    ],
)  # fmt: skip
def test_the_items_of_a_request_are_limited(path: str, document: Any, param: str) -> None:
    with pytest.raises(RequestTooComplex, match="more than 2048 messages") as refused:
        read(document, path)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "document",
    [
        {"messages": [USER] * 2047},
        chat(*[TEXT] * 2000),
        {"prompt": [1] * 299_000},
        {"prompt": [[1] * 1000] * 290},
        chat({"type": "text", "text": '[{,"\\' * 30_000}),
        chat_with(tools=[{"parameters": {"p": [{}] * 50_000}}]),
    ],
)
def test_what_clients_send_is_within_the_bounds(document: Any) -> None:
    read(document)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b'{"prompt":[' + b"1," * 300_000 + b"1]}", "300000 JSON values"),
        (b'{"a":[' + b'"",' * 300_000 + b"1]}", "300000 JSON values"),
        (b'{"a":[' + b"{}," * 150_000 + b"1]}", "300000 JSON values"),
        (b'{"a":"\\\\",' + b'"b":1,' * 60_000 + b'"c":[' + b"[]," * 40_000 + b"1]}",
         "300000 JSON values"),
        (b"[" * 200 + b"]" * 200, "128 levels"),
        (b'{"a":' * 129 + b"1" + b"}" * 129, "128 levels"),
        (b'["]\\"",' + b"[" * 200 + b"]" * 201, "128 levels"),
        (b"[" * 1_000_000, "300000 JSON values"),
    ],
)  # fmt: skip
def test_values_and_nesting_are_limited_before_parsing(body: bytes, what: str) -> None:
    with pytest.raises(RequestTooComplex, match=f"more than {what}"):
        read(body)


json_values = st.recursive(
    st.none() | st.integers() | st.text('a[]{},"\\'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('a[]{},"\\'), inner),
    max_leaves=25,
)


def values_and_depth(value: Any) -> tuple[int, int]:
    """How many values there are, as `BodyBounds` counts them, and how deeply they are nested."""
    if isinstance(value, str):
        return 4, 0
    if not isinstance(value, (dict, list)):
        return 1, 0
    inner = list(value.values()) if isinstance(value, dict) else value
    found = [values_and_depth(each) for each in inner]
    names = 3 * len(value) if isinstance(value, dict) else 0
    empty = 0 if value else 1  # it is counted as if it had a value
    values = 4 + names + empty + sum(each for each, _ in found)
    return values, 1 + max((depth for _, depth in found), default=0)


@given(json_values)
def test_the_bounds_are_those_of_the_parsed_document(document: Any) -> None:
    values, depth = values_and_depth(document)
    body = json.dumps(document).encode()
    check_text(body, BodyBounds(0, values, depth, 0))
    tight = [BodyBounds(0, values - 1, depth, 0)]
    tight += [BodyBounds(0, values, depth - 1, 0)] if depth else []
    for bounds in tight:
        with pytest.raises(RequestTooComplex):
            check_text(body, bounds)


def test_keys_with_escapes_are_recognized() -> None:
    body = b'{"messages":[{"role":"user","content":[{"type":"im\\u0061ge_url","im\\u0061ge_url":'
    body += b'{"url":"https://a.example/","det\\u0061il":"no"}}]}]}'
    with pytest.raises(ClientError, match="detail"):
        read(body)


# ---------------------------------------------------------------------- rewritten bodies


def test_a_request_without_media_is_passed_on_byte_for_byte() -> None:
    body = json.dumps(chat({"type": "text", "text": "a"}), indent=3).encode()
    assert read(body).rewritten() is body


def test_handles_are_valid_only_in_their_request() -> None:
    first, second = (prepare(chat(pictures.image_part(SMALL))) for _ in range(2))
    (part,) = first.content()
    assert part["type"] == "image_url"
    handle = part["image_url"]["url"]
    assert first.image(handle).data == SMALL
    assert second.context.resolve(handle) is None


def test_other_keys_of_a_part_are_passed_to_the_template() -> None:
    part = {**pictures.image_part(SMALL), "caption": "a", "detail": "low", "uuid": "U"}
    assert prepare(chat(part)).content()[0].keys() == {"type", "image_url", "caption"}


def test_a_text_part_with_a_uuid_stays_a_text_part() -> None:
    """vLLM treats any part with a uuid as media."""
    part = {"type": "text", "text": "a", "uuid": "U", "image_url": "http://127.0.0.1/"}
    content = prepare(chat(part)).content()
    assert content == [{"type": "text", "text": "a", "image_url": "http://127.0.0.1/"}]


def test_the_servers_own_options_are_removed_from_the_body() -> None:
    prepared = prepare(
        chat(pictures.image_part(SMALL), max_image_tokens=99, include_image_details=True,
             stream=True)
    )  # fmt: skip
    context = prepared.context
    assert (context.max_image_tokens, context.include_image_details) == (99, True)
    assert prepared.document.keys() == {"messages", "stream", "stream_options"}
    assert prepared.document["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_image_tokens", 0),
        ("max_image_tokens", "9"),
        ("include_image_details", 1),
        ("include_grounding", 1),
        ("include_grounding", "yes"),
        ("include_grounding", {"x": 1}),
    ],
)
def test_the_error_for_an_invalid_request_option_names_it(name: str, value: object) -> None:
    with pytest.raises(ClientError, match=name) as refusal:
        read(chat(pictures.text_part("image"), **{name: value}))
    assert refusal.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 0),
        ("scale", "mm"),
        ("scale", True),
        ("scale", None),
        ("scale", 1e7),
        ("image", -1),
        ("image", 1.0),
        ("image", True),
        ("image", 10**18),
    ],
)
def test_the_error_for_an_invalid_option_of_grounding_names_it(name: str, value: object) -> None:
    with pytest.raises(ClientError) as refusal:
        read(chat(pictures.text_part("image"), include_grounding={name: value}))
    assert refusal.value.param == f"include_grounding.{name}"


def test_grounding_is_read_and_removed_from_the_body() -> None:
    part = pictures.image_part(SMALL)
    given = {"scale": "pixels", "image": 3}
    prepared = prepare(chat(part, include_grounding=given, stream=True))
    assert prepared.context.grounding == GroundingOptions(None, 3)
    assert prepared.document.keys() == {"messages", "stream", "stream_options"}
    assert prepare(chat(part, include_grounding=True)).context.grounding == GroundingOptions(1000)
    assert prepare(chat(part, include_grounding=False)).context.grounding is None
    assert of_model("qwen2_5_vl").scale is None
    with pytest.raises(ClientError) as refusal:
        check_image(GroundingOptions(image=2), 2)
    assert refusal.value.param == "include_grounding.image"
    check_image(GroundingOptions(), 0)


def test_texts_of_anthropic_documents_become_text() -> None:
    image = {
        "type": "image",
        "source": {"type": "base64", "data": base64.b64encode(SMALL).decode()},
    }
    inner = {"type": "content", "content": ["one", {"type": "text", "text": "two"}, image]}
    blocks = [
        image,
        {"type": "document", "source": {"type": "text", "data": "first"}, "title": "Title"},
        {"type": "document", "source": inner},
        {"type": "document", "source": {"type": "content", "content": "last"}},
    ]
    prepared = prepare({"messages": [{"role": "user", "content": blocks}]}, MESSAGES)
    content = prepared.content()
    shown = [part.get("text", part["type"]) for part in content]
    assert shown == ["image", "Title", "first", "one", "two", "image", "last"]
    handles = [part["source"]["url"] for part in content if part["type"] == "image"]
    assert [prepared.image(handle).path for handle in handles] == [
        "messages[0].content[0].source",
        "messages[0].content[2].source.content[2].source",
    ]


class CountedWrites(list[Any]):
    """A content list that counts assignments to it."""

    count = 0

    def __setitem__(self, *args: Any) -> None:
        self.count += 1
        super().__setitem__(*args)


def test_a_list_with_many_media_is_rewritten_once() -> None:
    parts = CountedWrites(range(1000))
    slots = [Slot(parts, index, nodes=lambda: ["a", "b"]) for index in range(0, 1000, 2)]
    Found(slots).fill(lambda _: [])
    assert parts.count == 1
    assert parts == [new for index in range(1, 1000, 2) for new in ("a", "b", index)]


@pytest.mark.parametrize(
    "source", [{"type": "text"}, {"type": "text", "data": 5}, {"type": "content", "content": None}]
)
def test_a_document_without_text_is_refused(source: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "document", "source": source}]}]}
    with pytest.raises(ClientError, match="no text") as refusal:
        read(body, MESSAGES)
    assert (refusal.value.param or "").startswith("messages[0].content[0].source.")


def test_parts_are_counted_before_loading() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://a.example/"}}
    assert len(read(chat(*[part] * 8)).context.media) == 8
    with pytest.raises(TooManyImages, match="more than 8 images") as refusal:
        read(chat(*[part] * 9))
    assert refusal.value.param == "messages[0].content[8].image_url"
    clip = {"type": "video_url", "video_url": {"url": "https://a.example/"}}
    with pytest.raises(TooManyImages, match="more than 2 video parts"):
        read(chat(*[clip] * 3))


@pytest.mark.parametrize("limits", [None, replace(LIMITS, max_clips={"video": 999})])
def test_parts_beyond_the_limit_are_not_parsed(limits: MediaLimits | None) -> None:
    """Each takes memory: a list of pages is many times as long as the text that selects it."""
    part = {"type": "file", "file": {"file_data": "AA=="}, "pages": "1-9999"}
    wrong = {"type": "file", "file": 5}
    messages = [*chat(*[part] * 100, wrong)["messages"], *chat(wrong)["messages"]]
    with pytest.raises(ClientError) as refusal:
        read({"messages": messages}, limits=limits)
    last = 0 if limits is None else limits.max_images
    assert refusal.value.param == f"messages[0].content[{last}].file"

"""The parts of requests, in every dialect, and what they may ask for."""

import copy
from typing import Any

import pytest

from server.errors import ClientError, InvalidFile, InvalidImageUrl
from server.imaging.encoded import ImageOptions
from server.request import parts
from server.request.parts import Part

URL = "https://example.com/a.png"


def document(*content: dict[str, Any], key: str = "messages") -> dict[str, Any]:
    return {key: [{"role": "user", "content": list(content)}]}


def only(content: dict[str, Any]) -> Part:
    (part,) = parts.parts_of(document(content))
    return part


IMAGES = {
    "chat": {"type": "image_url", "image_url": {"url": URL}},
    "chat, a plain URL": {"type": "image_url", "image_url": URL},
    "responses": {"type": "input_image", "image_url": URL, "detail": "auto"},
    "messages, a URL": {"type": "image", "source": {"type": "url", "url": URL}},
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_found_and_renamed_in_its_dialect(name: str) -> None:
    content = copy.deepcopy(IMAGES[name])
    part = only(content)
    assert (part.kind, part.name, parts.url_of(part)) == ("image", URL, URL)
    assert part.path.startswith("messages[0].content[0].")
    parts.set_name(part, "other")
    assert only(content).name == "other"
    assert only(parts.image_like(part, "third")).name == "third"


def test_anthropic_data_becomes_a_data_url() -> None:
    source = {"type": "base64", "media_type": "image/webp", "data": "AAAA"}
    part = only({"type": "image", "source": source})
    assert parts.url_of(part) == "data:image/webp;base64,AAAA"
    parts.set_name(part, "saccade:max_tokens=5,data:image/webp;base64,AAAA")
    assert part.node["source"]["type"] == "url"


@pytest.mark.parametrize(
    ("content", "url"),
    [
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AA=="}}, None),
        ({"type": "file", "file": {"file_data": "AA=="}}, "data:application/pdf;base64,AA=="),
        ({"type": "input_file", "file_url": URL}, URL),
        ({"type": "document", "source": {"type": "base64", "data": "AA=="}}, None),
        ({"type": "document", "source": {"type": "url", "url": URL}}, URL),
    ],
)
def test_files_are_found_with_their_data(content: dict[str, Any], url: str | None) -> None:
    part = only(content)
    assert part.kind == "file"
    assert parts.file_url(part) == (url or "data:application/pdf;base64,AA==")


def test_a_file_without_data_is_refused() -> None:
    with pytest.raises(InvalidFile, match="no file_data") as refusal:
        parts.file_url(only({"type": "file", "file": {"filename": "a.pdf"}}))
    assert refusal.value.param == "messages[0].content[0].file"


def test_what_is_no_part_is_left_alone() -> None:
    schema = {"type": "object", "properties": {"image_url": {"type": "string"}}}
    request = document({"type": "text", "text": URL}) | {
        "tools": [{"function": {"parameters": schema}, "image_url": URL}],
        "text": {"format": {"schema": schema}},
    }
    assert list(parts.parts_of(request)) == []


@pytest.mark.parametrize("beside_url", [True, False])
def test_options_stand_beside_the_url_or_in_the_part(beside_url: bool) -> None:
    content: dict[str, Any] = {"type": "image_url", "image_url": {"url": URL}}
    (content["image_url"] if beside_url else content).update(detail="low", max_tokens=64)
    part = only(content)
    wish = parts.take_wish(part)
    assert wish is not None
    assert wish.options == ImageOptions("low", 64)
    assert content == {"type": "image_url", "image_url": {"url": URL}}


def test_responses_keep_the_detail_their_schema_wants() -> None:
    content = {"type": "input_image", "image_url": URL, "detail": "high", "max_tokens": 9}
    wish = parts.take_wish(only(content))
    assert wish is not None
    assert wish.options == ImageOptions("high", 9)
    assert content == {"type": "input_image", "image_url": URL, "detail": "high"}


def test_no_options_is_no_wish() -> None:
    assert parts.take_wish(only(copy.deepcopy(IMAGES["chat"]))) is None
    content = {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}
    assert parts.take_wish(only(content)) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("detail", "medium"), ("detail", 3), ("max_tokens", 0), ("max_tokens", True),
        ("max_tokens", "64"), ("max_tokens", 1.5), ("frames", -1), ("frames", []),
        ("frames", [1, "2"]), ("frames", [-1]), ("frames", True),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(option: str, value: object) -> None:
    part = only({"type": "image_url", "image_url": {"url": URL, option: value}})
    with pytest.raises(ClientError, match=option) as refusal:
        parts.take_wish(part)
    assert refusal.value.param == f"messages[0].content[0].image_url.{option}"


@pytest.mark.parametrize(
    ("pages", "wanted"),
    [("1", (0,)), ("1-3,7", (0, 1, 2, 6)), ("2, 1", (1, 0)), ([3, "5-6"], (2, 4, 5)), (4, (3,))],
)
def test_pages_are_counted_from_one(pages: object, wanted: tuple[int, ...]) -> None:
    part = only({"type": "file", "file": {"file_data": "AA==", "pages": pages}})
    wish = parts.take_wish(part)
    assert wish is not None
    assert wish.frames == wanted


@pytest.mark.parametrize(
    "pages", ["0", "3-1", "a", "1-", "-2", "", "1,,2", "1-99999,1-99999", "²", "9" * 9, {}, True]
)
def test_wrong_pages_are_named(pages: object) -> None:
    part = only({"type": "file", "file": {"file_data": "AA==", "pages": pages}})
    with pytest.raises(ClientError, match="pages"):
        parts.take_wish(part)


@pytest.mark.parametrize(
    "options",
    [ImageOptions("low"), ImageOptions(max_tokens=7), ImageOptions("high", 9, 3)],
)
def test_options_travel_with_the_name(options: ImageOptions) -> None:
    name = parts.with_options("data:image/png;base64,AA,==", options)
    assert parts.split_options(name) == ("data:image/png;base64,AA,==", options)
    assert parts.with_options(URL, ImageOptions()) == URL
    assert parts.split_options(URL) == (URL, ImageOptions())


def test_a_client_cannot_write_the_options_itself() -> None:
    with pytest.raises(InvalidImageUrl):
        parts.refuse_forged(only({"type": "image_url", "image_url": {"url": "saccade:x,data:"}}))


def test_a_uuid_alone_can_have_options() -> None:
    content = {"type": "image_url", "image_url": None, "uuid": "U", "max_tokens": 5}
    part = only(content)
    assert (part.name, part.has_data) == ("U", False)
    wish = parts.take_wish(part)
    assert wish is not None
    parts.set_name(part, parts.with_options(part.name, wish.options))
    assert parts.split_options(content["uuid"]) == ("U", ImageOptions(max_tokens=5))

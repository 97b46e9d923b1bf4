"""Payloads are taken out of bodies, and only where they are images."""

import asyncio
import base64
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ImageTooLarge, InvalidImageUrl
from server.request import context as request
from server.request import payloads
from server.request.image_request import ImageRequest
from server.request.parts import parts_of
from server.request.payloads import MIN_PAYLOAD_BYTES
from server.telemetry.record import Record

DATA = os.urandom(MIN_PAYLOAD_BYTES)
URL = "data:image/png;base64," + base64.b64encode(DATA).decode()
LIMIT = 1 << 30


def chat(*parts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


def split(document: Any, **dump: Any) -> payloads.TakenOut:
    return payloads.take_out(json.dumps(document, **dump).encode())


def enter(taken: payloads.TakenOut) -> None:
    parts = [(part.path, part.name) for part in parts_of(taken.document)]
    request.enter(ImageRequest(Record(), body=taken.body, payloads=taken.payloads, parts=parts))


def url_of(request: Any) -> str:
    (part,) = request["messages"][0]["content"]
    url = part["image_url"]
    return url["url"] if isinstance(url, dict) else url


@pytest.mark.parametrize("dump", [{}, {"separators": (",", ":")}, {"indent": 2}])
@pytest.mark.parametrize("part", [{"image_url": {"url": URL}}, {"image_url": URL}])
def test_a_long_payload_is_taken_out_and_found_again(part: Any, dump: Any) -> None:
    taken = split(chat({"type": "image_url", **part}), **dump)
    assert len(taken.body) < 1000
    enter(taken)
    url = url_of(json.loads(taken.body))
    assert payloads.load_data_url(url, LIMIT) == DATA
    assert request.current().path_of(url) == "messages[0].content[0].image_url"


def test_anthropic_sources_are_taken_out() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}
    taken = split(chat({"type": "image", "source": source}))
    assert len(taken.body) < 1000
    enter(taken)
    (part,) = json.loads(taken.body)["messages"][0]["content"]
    url = f"data:image/png;base64,{part['source']['data']}"
    assert payloads.load_data_url(url, LIMIT) == DATA
    assert request.current().path_of(url) == "messages[0].content[0].source"


@pytest.mark.parametrize(
    "request_",
    [
        chat({"type": "text", "text": URL}),
        chat({"type": "text", "text": f'he said "{URL}"'}),
        chat({"type": "video_url", "video_url": {"url": URL}}),
        {"prompt": URL},
        {"data": URL.partition(",")[2]},
    ],
)
def test_what_only_looks_like_an_image_stays(request_: Any) -> None:
    assert json.loads(split(request_).body) == request_


def test_images_and_lookalikes_in_one_request() -> None:
    request = chat(
        {"type": "text", "text": URL},
        {"type": "image_url", "image_url": {"url": URL}},
    )
    taken = split(request)
    text, image = json.loads(taken.body)["messages"][0]["content"]
    assert text["text"] == URL
    enter(taken)
    assert payloads.load_data_url(image["image_url"]["url"], LIMIT) == DATA


def test_escaped_slashes_stay_for_the_json_parser() -> None:
    body = json.dumps(chat({"type": "image_url", "image_url": {"url": URL}})).replace("/", "\\/")
    taken = payloads.take_out(body.encode())
    assert url_of(json.loads(taken.body)) == URL


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": "data:image/png;base64,', b"\xff\xfe" * 9000])
def test_broken_bodies_pass_as_they_are(body: bytes) -> None:
    assert payloads.take_out(body).body == body


KEYS = st.sampled_from(["image_url", "url", "data", "source", "type", "text"])
VALUES = st.none() | st.text() | st.sampled_from(["<url>", "image", "image_url"])


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner)))
def test_any_request_survives(shape: Any) -> None:
    request = json.loads(json.dumps(shape).replace("<url>", URL))
    taken = split(request)
    small = taken.body.decode()
    for token, payload in taken.payloads.items():
        small = small.replace(token, bytes(payload).decode())
    assert (json.loads(small) == request) is True  # without a diff of megabytes


def test_a_token_means_nothing_in_another_request() -> None:
    taken = split(chat({"type": "image_url", "image_url": {"url": URL}}))
    url = url_of(json.loads(taken.body))

    async def other_request() -> None:
        request.enter(ImageRequest(Record()))
        with pytest.raises(InvalidImageUrl, match="not valid base64"):
            payloads.load_data_url(url, LIMIT)

    asyncio.run(other_request())


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,@@@@",
        "data:image/png;base64,iVBOR",
        "data:image/png,plain",
        "data:,",
        "data:image/png;base64,aGVs bG8=",
    ],
)
def test_bad_data_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidImageUrl):
        payloads.load_data_url(url, LIMIT)


def test_many_misplaced_payloads_are_put_back_in_one_go() -> None:
    request = chat(*[{"type": "text", "text": URL}] * 500)
    assert (json.loads(split(request).body) == request) is True


def test_a_guessed_token_is_only_a_text() -> None:
    taken = split(chat({"type": "image_url", "image_url": {"url": URL}}))
    (token,) = taken.payloads
    again = split(chat({"type": "text", "text": URL}, {"type": "text", "text": token}))
    texts = [part["text"] for part in json.loads(again.body)["messages"][0]["content"]]
    assert texts[1] == token
    assert (texts[0] == URL) is True


def test_a_payload_over_the_limit_is_not_decoded() -> None:
    with pytest.raises(ImageTooLarge, match="the limit is 1000 bytes"):
        payloads.load_data_url(URL, 1000)


def test_more_than_ten_payloads_keep_apart() -> None:
    texts = [{"type": "text", "text": URL}, {"type": "image_url", "image_url": {"url": URL}}] * 8
    taken = split(chat(*texts))
    parts = json.loads(taken.body)["messages"][0]["content"]
    assert [part["text"] == URL for part in parts[::2]] == [True] * 8
    assert len({part["image_url"]["url"] for part in parts[1::2]}) == 8

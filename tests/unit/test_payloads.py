"""Base64 and data URLs as clients write them."""

import base64
import random
from urllib.parse import quote, quote_from_bytes

import pytest

from server.errors import ImageTooLarge, InvalidImageUrl, TooManyImages
from server.request import payloads

# With characters that differ between the alphabets.
DATA = b"\xfb\xff\xfe" + random.Random(8).randbytes(5000)
B64 = base64.b64encode(DATA).decode()
LIMIT = 1 << 20


@pytest.mark.parametrize(
    "text",
    [
        B64,
        base64.encodebytes(DATA).decode(),
        base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
        " \n" + B64 + "\t",
        B64.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        quote(B64),
        " ".join(B64[at : at + 40] for at in range(0, len(B64), 40)),
    ],
)
@pytest.mark.parametrize(
    "header",
    [
        "",
        "data:image/png;base64,",
        "DATA:image/png;BASE64,",
        "data:;base64,",
        " data:a/b;c=d;base64,",
        "data:image/png; base64,",
    ],
)
def test_every_variant_of_base64_is_decoded(header: str, text: str) -> None:
    assert payloads.decode(header + text, LIMIT) == DATA
    view = memoryview((header + text).strip().encode())
    assert payloads.decode(view, LIMIT) == DATA


def test_a_percent_encoded_data_url_is_decoded() -> None:
    assert payloads.decode("data:image/png," + quote_from_bytes(DATA), LIMIT) == DATA
    assert payloads.decode("data:,plain", LIMIT) == b"plain"


LONG = base64.b64encode(bytes(payloads.MIN_PAYLOAD_BYTES)).decode()


@pytest.mark.parametrize(
    "header",
    [
        "data:image/png;base64,",
        r"data:image\/png;base64,",
        "data:image/*;base64,",
        "data:;base64,",
        "  DATA:image/svg+xml;charset=utf-8;x=!#$&^_.+-;Base64,",
        "data:image/png; base64 ,",
        "data:text/plain;name=a%20b.txt;base64,",
    ],
)
def test_a_long_payload_is_taken_out_of_every_data_url(header: str) -> None:
    body = f'{{"a": "{header}{LONG}", "b": "{header}{LONG}"}}'.encode()
    found = payloads.Payloads(body)
    document = payloads.parse(found.small)
    assert len(found.small) < 1000
    for text in document.values():
        view = found.claim(text)
        assert isinstance(view, memoryview)
        assert payloads.decode(view, LIMIT) == bytes(payloads.MIN_PAYLOAD_BYTES)


@pytest.mark.parametrize(
    "text", [f"data:image/png,{LONG}", f"see data:image/png;base64,{LONG}", f"data:;base64;{LONG}"]
)
def test_other_texts_stay_in_the_document(text: str) -> None:
    body = f'{{"a": "{text}"}}'.encode()
    assert payloads.Payloads(body).small == body


@pytest.mark.parametrize(
    "text",
    ["data:image/png;base64,@@@@", "data:image/png;base64,iVBOR", "data:image/png;base64", "data:",
     "@@@@", "A", "data:image/png;base64,aé==", "AAAA\\u0041AAA"],
)  # fmt: skip
def test_invalid_base64_is_refused(text: str) -> None:
    with pytest.raises(InvalidImageUrl):
        payloads.decode(text, LIMIT)


@pytest.mark.parametrize(
    "text", [B64, base64.encodebytes(DATA).decode(), "data:image/png," + quote_from_bytes(DATA)]
)
def test_a_payload_over_the_limit_is_refused(text: str) -> None:
    assert payloads.decode(text, len(DATA)) == DATA
    with pytest.raises(ImageTooLarge, match="more than 1000 bytes"):
        payloads.decode(text, 1000)
    with pytest.raises(ImageTooLarge):
        payloads.decode(text, len(DATA) - 1)


def test_pictures_of_a_video_stand_in_one_text() -> None:
    pictures = [b"\xff\xd8\xff" + bytes([number]) * 30 for number in range(4)]
    listed = ",".join(base64.b64encode(picture).decode() for picture in pictures)
    for text in (listed, "data:video/jpeg;base64," + listed):
        assert payloads.pictures(text, LIMIT, 4) == pictures
        escaped = memoryview(text.replace("/", "\\/").encode())  # as it stands in JSON
        assert payloads.pictures(escaped, LIMIT, 4) == pictures
        with pytest.raises(TooManyImages, match="more than 3 pictures"):
            payloads.pictures(text, LIMIT, 3)
        with pytest.raises(ImageTooLarge):
            payloads.pictures(text, sum(map(len, pictures)) - 1, 4)
    assert payloads.pictures(B64, LIMIT, 4) is None

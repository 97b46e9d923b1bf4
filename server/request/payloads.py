"""Takes base64 payloads out of a JSON body before it is parsed, and decodes them.

A 12-megapixel photo is 6 MB of base64 inside a JSON string. Parsed the usual way it is scanned,
copied and validated several times, all of it on the event loop. Instead the body is scanned once,
in a thread, each long payload is replaced by a short token, and what remains is a small ordinary
document. The reader of a media part claims the token that stands in it; what nobody claims, since
it stands where no media belongs, is put back.
"""

import re
import secrets
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import pybase64

from server.errors import ClientError, ImageTooLarge, InvalidImageUrl, TooManyImages
from server.imaging.containers import holds_pictures

# Shorter payloads stay where they are: parsing them costs less than taking them out.
MIN_PAYLOAD_BYTES = 16 * 1024

# What stands before a payload: the header of a data URL, whatever type it names, whose slashes may
# be escaped; or the key `data` of an Anthropic source or of an audio clip, or OpenAI's `file_data`.
_HEADER = re.compile(
    rb'"\s{0,8}data:(?:[^",\\]|\\/){0,256};\s{0,8}base64\s{0,8},',
    re.IGNORECASE,
)
_KEY = re.compile(rb'"(?:file_)?data"\s{0,8}:\s{0,8}"\Z', re.IGNORECASE)
_MAX_KEY_BYTES = len(b'"file_data":"') + 16
_TOKEN = re.compile(rb"saccade-payload-[0-9a-f]{32}-[0-9]+;")
_TOKEN_PREFIX = "saccade-payload-"  # noqa: S105 - not a secret
_MAX_HEADER_BYTES = 512
# JSON escapes that may stand inside of base64: line breaks, tabs and slashes.
_OTHER_ESCAPE = re.compile(rb"\\[^nrt/]")
_COMMA = re.compile(b",")
_BLANKS = b" \t\r\n\f\v"
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_UTF8_BOM = b"\xef\xbb\xbf"


class Payloads:
    """The payloads of one body, and the small body that is left without them.

    Attributes:
        small: the body, with a token in the place of each payload.
    """

    def __init__(self, body: bytes) -> None:
        """Scans `body`; its time grows with the body."""
        spans = list(_payload_spans(body))
        secret = secrets.token_hex(16)  # so that no client can write a token
        tokens = [f"{_TOKEN_PREFIX}{secret}-{number};" for number in range(len(spans))]
        self._body = body
        self._spans = dict(zip(tokens, spans, strict=True))
        self._claimed: set[str] = set()
        self.small = self._without(body) if spans else body

    def _without(self, body: bytes) -> bytes:
        view, done = memoryview(body), 0
        pieces: list[bytes | memoryview] = []
        for token, (start, end) in self._spans.items():
            pieces += [view[done:start], token.encode()]
            done = end
        pieces.append(view[done:])
        return b"".join(pieces)

    def claim(self, text: str) -> str | memoryview:
        """The payload whose token ends `text`, as a view of the body; `text` itself if none does.

        A `data:` URL ahead of the token is dropped: what is taken out of one is base64.
        """
        at = text.find(_TOKEN_PREFIX) if self._spans else -1
        span = self._spans.get(text[at:]) if at >= 0 else None
        if span is None:
            return text
        self._claimed.add(text[at:])
        return memoryview(self._body)[slice(*span)]

    @property
    def unclaimed_bytes(self) -> int:
        """How many bytes `restored` would add."""
        left = self._spans.keys() - self._claimed
        return sum(end - start for start, end in map(self._spans.__getitem__, left))

    def restored(self, document: bytes) -> bytes:
        """`document`, JSON with tokens in it, with the payloads that nobody has claimed."""
        if len(self._claimed) == len(self._spans):
            return document

        def original(match: re.Match[bytes]) -> bytes:
            span = self._spans.get(match[0].decode())
            return match[0] if span is None else self._body[slice(*span)]

        return _TOKEN.sub(original, document)


def parse(body: bytes) -> Any:
    """The JSON document `body`.

    Raises:
        ClientError: it is not JSON, or cannot be represented: lone surrogates, infinite numbers.
    """
    try:
        return msgspec.json.decode(body.removeprefix(_UTF8_BOM))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ClientError("the request body is not valid JSON") from None


def _payload_spans(body: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each base64 text that is long enough, in order.

    A payload has no quotes in it, so the scan jumps as far as a payload is long, back to the last
    quote there: a body full of quotes costs no more than one full of payloads.
    """
    opening = body.find(b'"')
    while opening >= 0:
        reach = opening + 1 + MIN_PAYLOAD_BYTES
        closing = body.rfind(b'"', opening + 1, reach)
        if closing < 0:
            closing = body.find(b'"', reach)
            start = _payload_start(body, opening)
            is_long = start is not None and closing - start >= MIN_PAYLOAD_BYTES
            if start is not None and is_long and _is_plain(body, start, closing):
                yield start, closing
        opening = closing


def _payload_start(body: bytes, quote: int) -> int | None:
    """Where the payload begins in the text behind `quote`; None if no payload belongs there."""
    before = _KEY.search(body, max(0, quote + 1 - _MAX_KEY_BYTES), quote + 1)
    before = before or _HEADER.match(body, quote)
    if before is None or body[before.start() - 1 : before.start()] == b"\\":  # an escaped quote
        return None
    return before.end()


def _is_plain(body: bytes, start: int, end: int) -> bool:
    """Whether a JSON string holds nothing but itself and escapes that base64 may have."""
    if body.find(b"\\", start, end) < 0:
        return True
    return body[end - 1 : end] != b"\\" and _OTHER_ESCAPE.search(body, start, end) is None


def is_small(text: str | memoryview) -> bool:
    """Whether `text` is cheap enough to decode on the event loop."""
    return len(text) < 4 * MIN_PAYLOAD_BYTES


def decode(text: str | memoryview, max_bytes: int) -> bytes:
    """The bytes of a `data:` URL (RFC 2397), base64 or percent-encoded, or of base64 alone.

    Base64 may have line breaks and blanks, lack its padding, or be of the alphabet for URLs.

    Raises:
        InvalidImageUrl: it is neither.
        ImageTooLarge: more than `max_bytes` once decoded.
    """
    raw = _ascii(text)
    if bytes(raw[:5]).lower() == b"data:":
        header, raw = _split(raw)
        if not header.lower().replace(b" ", b"").endswith(b";base64"):
            return _bounded(unquote_to_bytes(bytes(raw)), max_bytes)
    if len(raw) // 4 * 3 > 2 * max_bytes + 2:  # also if half of it were blanks
        raise _too_large(max_bytes)
    try:
        return _bounded(pybase64.b64decode(raw, validate=True), max_bytes)
    except ValueError:
        return _bounded(_decoded_leniently(bytes(raw), text), max_bytes)


def pictures(text: str | memoryview, max_bytes: int, most: int) -> list[bytes] | None:
    """The pictures that a video is sent as, in base64 with commas between them; None if `text` is
    anything else.

    Raises:
        InvalidImageUrl: it is neither a `data:` URL nor base64.
        ImageTooLarge: more than `max_bytes` in all.
        TooManyImages: more than `most` pictures.
    """
    raw = _ascii(text)
    if bytes(raw[:5]).lower() == b"data:":
        _, raw = _split(raw)
    if not holds_pictures(_unescaped(bytes(raw[:_MAX_HEADER_BYTES]), text)):
        return None
    if len(raw) // 4 * 3 > 2 * max_bytes + 2:
        raise _too_large(max_bytes)
    commas = [match.start() for match in islice(_COMMA.finditer(raw), most)]
    if len(commas) == most:
        raise TooManyImages(f"the video has more than {most} pictures, which is the limit")
    found = []
    for start, end in pairwise((-1, *commas, len(raw))):
        found.append(decode(raw[start + 1 : end], max_bytes))
        max_bytes -= len(found[-1])
    return found


def _ascii(text: str | memoryview) -> memoryview:
    if isinstance(text, memoryview):
        return text
    try:
        return memoryview(text.strip().encode("ascii"))
    except UnicodeEncodeError:
        raise _not_base64() from None


def _split(url: memoryview) -> tuple[bytes, memoryview]:
    """The header of a data URL, without `data:`, and what follows its comma."""
    header, comma, _ = bytes(url[:_MAX_HEADER_BYTES]).partition(b",")
    if not comma:
        raise InvalidImageUrl("the data URL is not of the form data:<type>;base64,<data>")
    return header[5:], url[len(header) + 1 :]


def _unescaped(raw: bytes, text: str | memoryview) -> bytes:
    """`raw` without the escapes of JSON that stand in it if `text` is a view of the body."""
    if isinstance(text, memoryview):
        for escape in (b"\\n", b"\\r", b"\\t"):
            raw = raw.replace(escape, b"")
        raw = raw.replace(b"\\/", b"/")
    return raw


def _decoded_leniently(raw: bytes, text: str | memoryview) -> bytes:
    raw = _unescaped(raw, text)
    if b"%" in raw:
        raw = unquote_to_bytes(raw)
    raw = raw.translate(_STANDARD_ALPHABET, _BLANKS).rstrip(b"=")
    try:
        return pybase64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except ValueError:
        raise _not_base64() from None


def _bounded(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


def _too_large(max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(f"the image has more than {max_bytes} bytes, which is the limit")


def _not_base64() -> InvalidImageUrl:
    return InvalidImageUrl("the data is not valid base64")

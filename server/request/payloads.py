"""Takes the base64 payloads out of a JSON body before anything parses it.

A 12-megapixel photo is 6 MB of base64 inside a JSON string. Parsed the usual way it is scanned,
copied and validated several times, all of it on the event loop. Instead the body is scanned once,
in a thread, each long payload is replaced by a short token, and what remains is a small ordinary
request. The token is resolved when the image is loaded, inside the same request only.
"""

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pybase64

from server.errors import ImageTooLarge, InvalidImageUrl
from server.request import context as request
from server.request.parts import parts_of

# Shorter payloads stay where they are: parsing them costs less than taking them out.
MIN_PAYLOAD_BYTES = 16 * 1024

_TOKEN_PREFIX = "saccade-payload-"  # noqa: S105
# Where a payload may begin: after the header of a data URL, as Anthropic's `source.data`, or as
# OpenAI's `file_data`.
_START = re.compile(
    rb'"data:[\w.+-]{1,40}/[\w.+-]{1,80};base64,|"(?:file_)?data"\s{0,8}:\s{0,8}"', re.IGNORECASE
)
_MAX_HEADER_BYTES = 200


@dataclass
class TakenOut:
    """A body without its `payloads`, which are views of the original; `document` is the small
    body parsed, or None if it is not JSON."""

    body: bytes
    payloads: dict[str, memoryview] = field(default_factory=dict)
    document: Any = None


def parsed(body: bytes) -> TakenOut:
    """`body` with its payloads left where they are."""
    return TakenOut(body, {}, _parse(body))


def take_out(body: bytes) -> TakenOut:
    """Split `body` into a small body with tokens and the payloads that the tokens stand for.

    A payload is only taken out of where an image's or a file's data belongs; a text that happens
    to look like one stays as it is.
    """
    spans = list(_payload_spans(body))
    if not spans:
        return parsed(body)
    secret = secrets.token_hex(16)  # so that no client can know a token before it is made
    names = [f"{_TOKEN_PREFIX}{secret}-{number}." for number in range(len(spans))]
    named = dict(zip(names, spans, strict=True))
    small = _replace(body, named)
    document = _parse(small)
    if document is None:  # the route will refuse it
        return TakenOut(small)
    rightly = {_token_of(part.name) for part in parts_of(document)}
    kept = {name: span for name, span in named.items() if name in rightly}
    if len(kept) < len(spans):
        small = _replace(body, kept)
        document = _parse(small)
    view = memoryview(body)
    payloads = {name: view[start:end] for name, (start, end) in kept.items()}
    return TakenOut(small, payloads, document)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _replace(body: bytes, spans: dict[str, tuple[int, int]]) -> bytes:
    """`body` with each span, in order, replaced by its name."""
    view, done = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    for name, (start, end) in spans.items():
        pieces += [view[done:start], name.encode()]
        done = end
    pieces.append(view[done:])
    return b"".join(pieces)


def _payload_spans(body: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each base64 text that is long enough, in order."""
    position = 0
    while match := _START.search(body, position):
        start = match.end()
        end = body.find(b'"', start)
        if end < 0:
            return
        position = end
        escaped = body[match.start() - 1 : match.start()] == b"\\"
        long_enough = end - start >= MIN_PAYLOAD_BYTES
        if long_enough and not escaped and body.find(b"\\", start, end) < 0:
            yield start, end


def _token_of(text: str) -> str:
    return text[text.find(_TOKEN_PREFIX) :] if _TOKEN_PREFIX in text else ""


def is_small(url: str) -> bool:
    """Whether the data URL `url` is cheap enough to load on the event loop."""
    return _TOKEN_PREFIX not in url and len(url) < 4 * MIN_PAYLOAD_BYTES


def load_data_url(url: str, max_bytes: int) -> bytes:
    """Decode a `data:` URL strictly, also one whose payload was taken out of this request.

    Raises:
        InvalidImageUrl: not base64, or damaged.
        ImageTooLarge: more than `max_bytes` once decoded.
    """
    payload: str | memoryview = _after_header(url)
    if isinstance(payload, str) and payload.startswith(_TOKEN_PREFIX):
        # Loaded once: the body is freed as soon as all its payloads are.
        context: Any = request.current()
        taken = context.payloads.pop(payload, None)
        if taken is None:
            raise _not_base64()
        payload = taken
        start = bytes(taken[:_MAX_HEADER_BYTES])
        if start[:5].lower() == b"data:":
            payload = taken[len(start) - len(_after_header(start.decode("latin-1"))) :]
    nbytes = len(payload) // 4 * 3
    if nbytes > max_bytes + 2:
        raise ImageTooLarge(f"the image has {nbytes} bytes, the limit is {max_bytes} bytes")
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError:
        raise _not_base64() from None


def _after_header(url: str) -> str:
    header, comma, rest = url[5:].partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidImageUrl("the data URL is not of the form data:<type>;base64,<data>")
    return rest


def _not_base64() -> InvalidImageUrl:
    return InvalidImageUrl("the data URL is not valid base64")

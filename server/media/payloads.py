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
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pybase64
from blake3 import blake3

from server.errors import ImageTooLarge, InvalidImage

# Shorter payloads stay where they are: parsing them costs less than taking them out.
MIN_PAYLOAD_BYTES = 16 * 1024

_TOKEN_PREFIX = "saccade-payload-"  # noqa: S105
# Where a payload may begin: after the header of a data URL, or as Anthropic's `source.data`.
_START = re.compile(rb'"data:image/[\w.+-]{1,40};base64,|"data"\s{0,8}:\s{0,8}"', re.IGNORECASE)


@dataclass(frozen=True)
class EncodedImage:
    """An image file and the hash of its bytes. `url` is how the request named it."""

    data: bytes = field(repr=False)
    digest: str
    url: str = field(repr=False)


@dataclass
class Payloads:
    """The payloads of one request and the small body they were taken from."""

    body: bytes = b""
    taken: dict[str, memoryview] = field(default_factory=dict)


_current: ContextVar[Payloads | None] = ContextVar("saccade_payloads", default=None)


def enter(payloads: Payloads) -> None:
    """Make `payloads` those of the request that the current task serves."""
    _current.set(payloads)


def current_body() -> bytes:
    """The small body of the current request; empty outside of one."""
    payloads = _current.get()
    return payloads.body if payloads is not None else b""


def take_out(body: bytes) -> Payloads:
    """Split `body` into a small body with tokens and the payloads that the tokens stand for.

    A payload is only taken out of where an image's data belongs; a text that happens to look like
    one stays as it is. The payloads are views of `body`.
    """
    spans = list(_payload_spans(body))
    if not spans:
        return Payloads(body)
    secret = secrets.token_hex(16)  # so that no client can know a token before it is made
    names = [f"{_TOKEN_PREFIX}{secret}-{number}." for number in range(len(spans))]
    small = _replace(body, dict(zip(names, spans, strict=True)))
    try:
        rightly = {_token_of(text) for _, text in image_parts(json.loads(small))}
    except (ValueError, RecursionError):
        return Payloads(small)  # the route will refuse it
    kept = {name: span for name, span in zip(names, spans, strict=True) if name in rightly}
    if len(kept) < len(spans):
        small = _replace(body, kept)
    view = memoryview(body)
    return Payloads(small, {name: view[start:end] for name, (start, end) in kept.items()})


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


def image_parts(request: Any) -> Iterator[tuple[str, str]]:
    """(path, URL or else uuid) of each image part of a parsed request, in order.

    Knows the parts of chat completions (`image_url`), responses (`input_image`) and messages
    (`image` with a `source`). The path is the dotted one that errors carry.
    """
    yield from _walk(request, "")


def _walk(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _walk(item, f"{path}[{index}]")
    elif isinstance(node, dict):
        url = node.get("image_url")
        if isinstance(url, dict):
            url = url.get("url")
        source = node.get("source")
        prefix = f"{path}." if path else ""
        if isinstance(url, str):
            yield f"{prefix}image_url", url
        elif node.get("type") == "image_url" and isinstance(node.get("uuid"), str):
            yield f"{prefix}uuid", node["uuid"]
        elif node.get("type") == "image" and isinstance(source, dict):
            yield f"{prefix}source", str(source.get("data") or source.get("url") or "")
        else:
            for key, value in node.items():
                yield from _walk(value, f"{prefix}{key}")


def _token_of(text: str) -> str:
    return text[text.find(_TOKEN_PREFIX) :] if _TOKEN_PREFIX in text else ""


def path_of(part: str) -> str | None:
    """Where the current request has the image named `part`, by its URL or else its uuid:
    "messages[0].content[1].image_url"."""
    try:
        request = json.loads(current_body())
    except ValueError:
        return None
    for path, name in image_parts(request):
        if name and part.endswith(name):
            return path
    return None


def is_small(url: str) -> bool:
    """Whether the data URL `url` is cheap enough to load on the event loop."""
    return _TOKEN_PREFIX not in url and len(url) < 4 * MIN_PAYLOAD_BYTES


def load_data_url(url: str, max_bytes: int) -> EncodedImage:
    """Decode a `data:` URL strictly, also one whose payload was taken out of this request.

    Raises:
        InvalidImage: not base64, or damaged.
        ImageTooLarge: more than `max_bytes` once decoded.
    """
    header, comma, text = url[5:].partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidImage("the data URL is not of the form data:<type>;base64,<data>", part=url)
    payload: str | memoryview = text
    if text.startswith(_TOKEN_PREFIX):
        payloads = _current.get()
        # Loaded once: the body is freed as soon as all its payloads are.
        taken = payloads.taken.pop(text, None) if payloads is not None else None
        if taken is None:
            raise InvalidImage("the data URL is not valid base64", part=url)
        payload = taken
    if len(payload) // 4 * 3 > max_bytes + 2:
        raise too_large(len(payload) // 4 * 3, max_bytes, url)
    try:
        data = pybase64.b64decode(payload, validate=True)
    except ValueError:
        raise InvalidImage("the data URL is not valid base64", part=url) from None
    return encoded(data, max_bytes, url)


def encoded(data: bytes, max_bytes: int, url: str) -> EncodedImage:
    """Hash `data`. Raises ImageTooLarge or, when there is none, InvalidImage."""
    if len(data) > max_bytes:
        raise too_large(len(data), max_bytes, url)
    if not data:
        raise InvalidImage("the image is empty", part=url)
    return EncodedImage(data, blake3(data).hexdigest(), url)


def too_large(nbytes: int, max_bytes: int, url: str) -> ImageTooLarge:
    return ImageTooLarge(f"the image has {nbytes} bytes, the limit is {max_bytes} bytes", part=url)

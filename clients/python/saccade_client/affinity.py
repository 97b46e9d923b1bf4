"""The key by which routers send requests about a picture to the server that has it in its caches.

It is a hash of the conversation's first picture, PDF or video: of the file's bytes where the client
has them, or else of the URL or the `file_id`. `clients/session_keys.json` has examples, which both
clients are tested with. The key is for routing only: a server decides nothing by it.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

from PIL import Image

from saccade_client.media import Document, Media

SESSION, ROUTING_KEY = "X-Session-ID", "X-SMG-Routing-Key"

_DIGITS = 32
_KINDS = ("image_url", "video_url", "file")
# Where the part of a medium has its source, in the order in which they are tried.
_SOURCES = ("url", "file_data", "file_id")


def of_source(source: bytes | str) -> str:
    """The key of a file, of a URL, or of the name of an upload."""
    data = source if isinstance(source, bytes) else _bytes_of(source)
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def of_medium(medium: Media) -> str:
    """The key of a picture, a PDF or a video."""
    source = medium.data if isinstance(medium, Document) else medium.source
    if isinstance(source, Image.Image):
        source = source.tobytes()
    return of_source(source or getattr(medium, "file_id", None) or "")


def of_part(part: Mapping[str, Any]) -> str | None:
    """The key of a part of the API: of its `uuid` if it has one; None if it is no such medium."""
    kind = part.get("type")
    if kind not in _KINDS:
        return None
    holder = part.get(kind)
    found: list[Any] = [holder]
    if isinstance(holder, Mapping):
        found = [holder.get(source) for source in _SOURCES]
    texts = [text for text in (part.get("uuid"), *found) if isinstance(text, str) and text]
    return of_source(texts[0]) if texts else None


def headers(key: str | None, given: Mapping[str, str]) -> dict[str, str]:
    """The headers with a request's key, if it has one. Those that the caller has `given` win."""
    named = {name.lower(): value for name, value in given.items()}
    key = named.get(SESSION.lower(), named.get(ROUTING_KEY.lower(), key))
    if key is None:
        return {}
    return {name: key for name in (SESSION, ROUTING_KEY) if name.lower() not in named}


def _bytes_of(text: str) -> bytes:
    """The bytes in a data URL, or else those of the text."""
    if text[:5].lower() == "data:":
        head, _, payload = text.partition(",")
        if head.endswith(";base64"):
            try:
                return base64.b64decode(payload, validate=True)
            except binascii.Error:
                pass
    return text.encode()

"""Where the media parts of a request stand, in the dialect of each route.

A dialect is a table: where content lists stand in a body, and which types of parts they may hold.
A part whose type is in the table of media becomes a `MediaRef`. One of a type in the table of texts
is left alone. Any other is refused, before vLLM sees it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from server.request.dialects import chat, messages, responses
from server.request.dialects.base import ContentList, Dialect, Found, Part, Slot, Write
from server.request.media import MediaRef

__all__ = ["Dialect", "Found", "Slot", "dialect_of"]

_POOLING = (
    "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank",
    "/v1/rerank", "/v2/rerank", "/invocations",
)  # fmt: skip


def _lists(document: Mapping[str, Any]) -> Iterator[ContentList]:
    yield from messages.MESSAGES.lists(document)
    yield from responses.RESPONSES.lists(document)


def _read_video(part: Part) -> tuple[MediaRef, Write]:
    """A `video` of either API."""
    return messages.read_video(part) if "source" in part.node else chat.read_video(part)


# What a count of tokens takes: the messages of any of them.
ANY = Dialect(
    _lists,
    {
        **messages.MESSAGES.media,
        **responses.RESPONSES.media,
        **chat.CHAT.media,
        "video": _read_video,
    },
    messages.MESSAGES.texts | responses.RESPONSES.texts | chat.CHAT.texts,
    chat.type_of,
    special=messages.MESSAGES.special,
)
_DIALECTS = {
    "/v1/images/tokens": ANY,
    **dict.fromkeys(_POOLING, chat.POOLING),
    **dict.fromkeys(("/v1/responses", "/v1/responses/render"), responses.RESPONSES),
    **dict.fromkeys(
        ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"), messages.MESSAGES
    ),
}


def dialect_of(path: str) -> Dialect:
    """The dialect of the route at `path`, below the root path."""
    return _DIALECTS.get(path, chat.CHAT)

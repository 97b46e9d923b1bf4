"""Anthropic's messages.

| block | its media |
| --- | --- |
| `image` | `source`: base64, a URL, or the id of a file |
| `document` | the same, of a PDF or a video; or a text, which becomes text blocks |
| `video` | the same, of a video |

They stand in the content of messages, and in that of `tool_result` blocks. Anthropic takes no
images in system prompts, and neither does vLLM's translation of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from server.errors import ClientError
from server.request.dialects.base import (
    ContentList,
    Dialect,
    Found,
    Part,
    Read,
    Slot,
    Write,
    anthropic_source,
    given_options,
    reference,
)
from server.request.dialects.videos import says_video, video_reference
from server.request.media import Kind, MediaRef
from server.request.options import VIDEO_OPTIONS, sampling_options

_TEXTS = frozenset({
    "text", "thinking", "redacted_thinking", "tool_use", "tool_reference", "tool_addition",
    "tool_removal", "server_tool_use", "search_result",
})  # fmt: skip


def _write(handle: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": handle}}


def _reader(kind: Kind) -> Read:
    def read(part: Part) -> tuple[MediaRef, Write]:
        holder = part.node.get("source")
        source = anthropic_source(holder, part)
        media_type = holder.get("media_type") if isinstance(holder, dict) else None
        if kind == "video" or (kind == "file" and says_video(media_type)):
            return video_reference("source", source, part, holder), _write
        ref = reference(kind, f"{part.path}.source", source, part, holder)
        if kind == "file":
            ref.sampling = sampling_options(*given_options(VIDEO_OPTIONS, part, holder))
        return ref, _write

    return read


def _refuse(part: Part) -> None:
    if part.role == "system":
        raise ClientError(
            "a system prompt takes no images or documents; put them into a user message",
            param=part.path,
        )


def _special(part: Part, content: ContentList, index: int, dialect: Dialect, found: Found) -> bool:
    """Text documents, and the lists inside of blocks."""
    node = part.node
    if node.get("type") == "tool_result":
        inner = node.get("content")
        if isinstance(inner, list):
            within = ContentList(f"{part.path}.content", inner, part.role)
            dialect.read_list(within, part.payloads, frozenset(), found)
        return True
    source = node.get("source")
    if node.get("type") != "document" or not isinstance(source, dict):
        return False
    if source.get("type") not in ("text", "content"):
        return False
    _refuse(part)
    texts = [node.get("title"), node.get("context")]
    before = [{"type": "text", "text": text} for text in texts if isinstance(text, str) and text]
    blocks = _blocks(source, part, dialect, found)
    found.slots.append(Slot(content.parts, index, nodes=lambda: [*before, *blocks]))
    return True


def _blocks(source: dict[str, Any], part: Part, dialect: Dialect, found: Found) -> list[Any]:
    """The blocks of a text document."""
    key = "data" if source.get("type") == "text" else "content"
    text, path = source.get(key), f"{part.path}.source.{key}"
    if isinstance(text, str) and text:
        return [{"type": "text", "text": text}]
    if key == "data" or not isinstance(text, list):
        raise ClientError("the document has no text", param=path)
    blocks = [{"type": "text", "text": item} if isinstance(item, str) else item for item in text]
    dialect.read_list(ContentList(path, blocks, part.role), part.payloads, frozenset(), found)
    return blocks


def _lists(document: Mapping[str, Any]) -> Iterator[ContentList]:
    system = document.get("system")
    if isinstance(system, list):
        yield ContentList("system", system, "system")
    messages = document.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            role = message.get("role")
            at = f"messages[{index}].content"
            yield ContentList(at, content, role if isinstance(role, str) else None)


read_video = _reader("video")
_MEDIA: Mapping[str, Read] = {
    "image": _reader("image"),
    "document": _reader("file"),
    "video": read_video,
}
MESSAGES = Dialect(
    _lists,
    _MEDIA,
    _TEXTS,
    lambda node: node.get("type"),
    refuse=_refuse,
    special=_special,
)

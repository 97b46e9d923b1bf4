"""OpenAI's responses.

| part | its media |
| --- | --- |
| `input_image` | `image_url`: a URL; or `file_id` |
| `input_file` | `file_data`, `file_url` or `file_id` |

They stand in the `content` of messages in `input`, and in the `output` of tool calls.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from server.request.dialects.base import (
    ContentList,
    Dialect,
    Part,
    Read,
    Write,
    file_source,
    reference,
)
from server.request.dialects.chat import read_image, type_of
from server.request.media import MediaRef

_TEXTS = frozenset({
    "input_text", "output_text", "refusal", "text", "summary_text", "reasoning_text",
})  # fmt: skip
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


def _write(handle: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": handle, "detail": "auto"}


def _read_image(part: Part) -> tuple[MediaRef, Write]:
    ref, _ = read_image(part)
    return ref, _write


def _read_file(part: Part) -> tuple[MediaRef, Write]:
    source = file_source(part.node, part, part.path)
    return reference("file", part.path, source, part), _write


def _lists(document: Mapping[str, Any]) -> Iterator[ContentList]:
    items = document.get("input")
    if not isinstance(items, list):
        return
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            continue
        role = item.get("role")
        if isinstance(item.get("content"), list):
            at = f"input[{index}].content"
            yield ContentList(at, item["content"], role if isinstance(role, str) else None)
        is_output = any(item.get("type") == kind for kind in _OUTPUTS)
        if is_output and isinstance(item.get("output"), list):
            yield ContentList(f"input[{index}].output", item["output"], "tool")


_MEDIA: Mapping[str, Read] = {
    "input_image": _read_image,
    "image_url": _read_image,
    "input_file": _read_file,
}
RESPONSES = Dialect(_lists, _MEDIA, _TEXTS, type_of)

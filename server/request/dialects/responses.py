"""OpenAI's responses.

| part | its media |
| --- | --- |
| `input_image` | `image_url`: a URL; or `file_id` |
| `input_file` | `file_data`, `file_url` or `file_id` |
| `input_video`, `video_url`, `video` | see `videos` |

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
)
from server.request.dialects.chat import read_image, type_of
from server.request.dialects.videos import VIDEO_KEYS, file_reference, video_of
from server.request.media import MediaRef

_TEXTS = frozenset({
    "input_text", "output_text", "refusal", "text", "summary_text", "reasoning_text",
})  # fmt: skip
# The texts of earlier answers, and the field of each.
_ANSWER_TEXTS = {"output_text": "text", "text": "text", "input_text": "text", "refusal": "refusal"}
_UNFINISHED = ("in_progress", "incomplete")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
# vLLM takes null for these, but fails to write its answer, which repeats them.
_NEVER_NULL = ("background", "truncation")


def _write(handle: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": handle, "detail": "auto"}


def _read_image(part: Part) -> tuple[MediaRef, Write]:
    ref, _ = read_image(part)
    return ref, _write


def _read_file(part: Part) -> tuple[MediaRef, Write]:
    return file_reference(None, part.node, part), _write


def _read_video(part: Part) -> tuple[MediaRef, Write]:
    """vLLM takes no videos here, so it gets an image, which the renderer turns into a video."""
    return video_of(part), _write


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


def complete(document: dict[str, Any]) -> bool:
    """Remove options that are null, which means their defaults, and complete the history of a
    conversation that a client wrote by hand; returns whether anything in `document` has changed.
    Items without a known form are left for vLLM to refuse.

    OpenAI takes items without `type`, `id`, `status` and `annotations`. vLLM's models of them do
    not, and vLLM shows the model only the first text of an earlier answer, and no refusal.
    """
    nulls = [name for name in _NEVER_NULL if document.get(name, "") is None]
    for name in nulls:
        del document[name]
    items = document.get("input")
    if not isinstance(items, list):
        return bool(nulls)
    completed = [_completed(item) for item in items]
    changed = any(new is not old for new, old in zip(completed, items, strict=True))
    if changed:
        document["input"] = completed
    return changed or bool(nulls)


def _completed(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if "type" in item and item["type"] is None:
        item = {name: value for name, value in item.items() if name != "type"}
    if item.get("type", "message") == "message" and item.get("role") == "assistant":
        return _answer(item)
    if item.get("type") == "reasoning":
        given = {name: value for name, value in item.items() if value is not None}
        if len(given) < len(item) or "summary" not in given:
            return {"summary": [], **given}
    return item


def _answer(item: dict[str, Any]) -> dict[str, Any]:
    """An earlier answer as a message with one text; itself if it is not made of texts."""
    parts = item.get("content")
    if not isinstance(parts, list):
        return item
    texts = [_text(part) for part in parts]
    if None in texts:
        return item
    answer = {"type": "message", "role": "assistant", "content": "".join(map(str, texts))}
    if item.get("status") in _UNFINISHED:  # vLLM continues it
        answer["status"] = item["status"]
    return answer


def _text(part: Any) -> str | None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return None
    text = part.get(_ANSWER_TEXTS.get(part["type"], ""))
    return text if isinstance(text, str) else None


_MEDIA: Mapping[str, Read] = {
    "input_image": _read_image,
    "image_url": _read_image,
    "input_file": _read_file,
    **dict.fromkeys(VIDEO_KEYS, _read_video),
}
RESPONSES = Dialect(_lists, _MEDIA, _TEXTS, type_of, complete=complete, text_type="input_text")

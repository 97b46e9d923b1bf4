"""Chat completions, and vLLM's routes that take its messages or content parts.

| part | its media |
| --- | --- |
| `image_url`, `input_image` | `image_url`: a URL or `{url, detail, ...}`; or a `file_id` |
| `image_file` | `image_file`: `{file_id, detail, ...}` |
| `file`, `input_file` | `file`: `{file_data or file_id, pages, ...}` |
| `video_url`, `input_video`, `video` | see `videos` |
| `audio_url` | the URL, or `{url}` |
| `input_audio` | `input_audio`: `{data, format}` |

`detail`, `max_tokens` and `frames` (of a file: `pages`; of a video: `fps`, `num_frames`,
`max_frames`, `start`, `end` and `max_tokens`) may stand beside the URL or in the part,
and so may the client's own name of an image, `uuid`, under which it can be sent without data again.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from server.errors import ClientError, InvalidFile, InvalidImageUrl
from server.request.dialects.base import (
    ContentList,
    Dialect,
    Part,
    Read,
    Write,
    data_source,
    read_bare_url,
    reference,
    sent_before,
    source_of,
    uploaded,
    uuid_of,
)
from server.request.dialects.videos import VIDEO_KEYS, VIDEO_READ_KEYS, file_reference, video_of
from server.request.media import MediaRef, SentBefore
from server.request.options import OPTIONS

_TEXTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"})
_EMBEDDINGS = frozenset({"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"})
# Of a part without a type, the key that tells what it is, in vLLM's order.
_TELLING_KEYS = (
    "image_url", "image_file", "image_pil", "image_embeds", "audio_embeds", "video_embeds",
    "prompt_embeds", "audio_url", "input_audio", "video_url", "input_video", "video", "file",
    "tool_reference",
)  # fmt: skip
# What is read of a media part. Its other keys go on to the chat template, as in vLLM.
_READ_KEYS = frozenset({*_TELLING_KEYS, *OPTIONS, "type", "uuid", "file_id", "file_data",
                        "file_url", "filename", "prompt_cache_breakpoint"})  # fmt: skip


def type_of(node: dict[str, Any]) -> object:
    """The type of a part, or else the one that its keys tell."""
    kind = node.get("type")
    if kind is not None:
        return kind
    return next((key for key in _TELLING_KEYS if key in node), None)


def _writer(part: Part, kind: str) -> Write:
    """Writes a part of the type `{kind}_url` with the other keys of `part`."""
    read = _READ_KEYS.union(VIDEO_READ_KEYS) if kind == "video" else _READ_KEYS
    others = {key: value for key, value in part.node.items() if key not in read}
    key = f"{kind}_url"
    return lambda handle: {**others, "type": key, key: {"url": handle}}


def read_image(part: Part) -> tuple[MediaRef, Write]:
    """An `image_url` or `input_image` part."""
    holder = part.node.get("image_url")
    return _image(part, holder), _writer(part, "image")


def _image(part: Part, holder: object) -> MediaRef:
    path = f"{part.path}.image_url"
    url = holder.get("url") if isinstance(holder, dict) else holder
    if url is not None:
        return reference("image", path, source_of(url, part, path), part, holder)
    for place, key in ((holder, "image_url"), (part.node, "file_id")):
        if (stored := uploaded(place)) is not None:
            return reference("image", f"{part.path}.{key}", stored, part, holder)
    if (ref := sent_before("image", part, holder)) is not None:
        return ref
    raise InvalidImageUrl("the part has no image: no URL, no file_id and no uuid", param=path)


def read_image_file(part: Part) -> tuple[MediaRef, Write]:
    """An `image_file` part: an uploaded image."""
    holder, path = part.node.get("image_file"), f"{part.path}.image_file"
    stored = uploaded(holder)
    if stored is None:
        raise ClientError("image_file must have a file_id", param=path)
    return reference("image", path, stored, part, holder), _writer(part, "image")


def read_file(part: Part) -> tuple[MediaRef, Write]:
    """A `file` part: a PDF or an image."""
    holder, path = part.node.get("file"), f"{part.path}.file"
    if not isinstance(holder, dict):
        raise InvalidFile("the file part has no file", param=path)
    return _file(file_reference("file", holder, part), part)


def read_input_file(part: Part) -> tuple[MediaRef, Write]:
    """An `input_file` part, whose keys stand in the part itself."""
    return _file(file_reference(None, part.node, part), part)


def _file(ref: MediaRef, part: Part) -> tuple[MediaRef, Write]:
    """The renderer turns an image that is a video into one."""
    write = _writer(part, "image")
    return ref, _clip_writer(part, "video") if ref.kind == "video" else write


def read_video(part: Part) -> tuple[MediaRef, Write]:
    """A part with a video; see `videos`."""
    return video_of(part), _clip_writer(part, "video")


def _read_audio_url(part: Part) -> tuple[MediaRef, Write]:
    holder, path = part.node.get("audio_url"), f"{part.path}.audio_url"
    url = holder.get("url") if isinstance(holder, dict) else holder
    if url is None and uuid_of(part) is not None:
        return _audio_sent_before(part)
    ref = MediaRef("audio", path, source_of(url, part, path), uuid=uuid_of(part), role=part.role)
    return ref, _clip_writer(part, "audio")


def read_input_audio(part: Part) -> tuple[MediaRef, Write]:
    """An `input_audio` part: base64 beside the name of its format."""
    holder, path = part.node.get("input_audio"), f"{part.path}.input_audio"
    data = holder.get("data") if isinstance(holder, dict) else None
    if data in (None, "") and uuid_of(part) is not None:
        return _audio_sent_before(part)
    if not isinstance(holder, dict):
        raise InvalidImageUrl("the part must have an input_audio object", param=path)
    source = data_source(data, part, f"{path}.data")
    return MediaRef("audio", path, source, uuid=uuid_of(part)), _clip_writer(part, "audio")


def _clip_writer(part: Part, kind: str) -> Write:
    """vLLM itself knows the uuids of clips."""
    write, uuid = _writer(part, kind), uuid_of(part)
    return write if uuid is None else lambda handle: {**write(handle), "uuid": uuid}


def _audio_sent_before(part: Part) -> tuple[MediaRef, Write]:
    ref = MediaRef("audio", f"{part.path}.uuid", SentBefore(), uuid=uuid_of(part))
    node = {"type": "audio_url", "audio_url": None, "uuid": uuid_of(part)}
    return ref, lambda _: node


def messages_at(value: Any, path: str) -> Iterator[ContentList]:
    """The content lists of one message, of messages, or of lists of messages."""
    if isinstance(value, dict):
        content, role = value.get("content"), value.get("role")
        if isinstance(content, list):
            yield ContentList(f"{path}.content", content, role if isinstance(role, str) else None)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            at = f"{path}[{index}]"
            if isinstance(item, list):
                for inner, message in enumerate(item):
                    if isinstance(message, dict):
                        yield from messages_at(message, f"{at}[{inner}]")
            else:
                yield from messages_at(item, at)


def _lists(*keys: str) -> Callable[[Mapping[str, Any]], Iterator[ContentList]]:
    def lists(document: Mapping[str, Any]) -> Iterator[ContentList]:
        for key in keys:
            if key in document:
                yield from messages_at(document[key], key)

    return lists


MEDIA: Mapping[str, Read] = {
    "image_url": read_image,
    "input_image": read_image,
    "image_file": read_image_file,
    "file": read_file,
    "input_file": read_input_file,
    **dict.fromkeys(VIDEO_KEYS, read_video),
    "audio_url": _read_audio_url,
    "input_audio": read_input_audio,
}
CHAT = Dialect(_lists("messages"), MEDIA, _TEXTS, type_of, _EMBEDDINGS)


_POOLING_KEYS = (
    "messages", "input", "inputs", "data_1", "data_2", "text_1", "text_2", "query", "queries",
    "documents", "items",
)  # fmt: skip


def _pooling_lists(document: Mapping[str, Any]) -> Iterator[ContentList]:
    yield from _lists(*_POOLING_KEYS)(document)
    images = document.get("images")  # Cohere's, which are bare URLs
    if isinstance(images, list):
        yield ContentList("images", images, bare=read_bare_url)


POOLING = Dialect(_pooling_lists, MEDIA, _TEXTS, type_of, _EMBEDDINGS)

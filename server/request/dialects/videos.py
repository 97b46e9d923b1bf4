"""Parts with videos, in the spellings that clients use.

| part | its video |
| --- | --- |
| `video_url` | `video_url`: a URL, or `{url, fps, ...}`, or `{file_id, ...}` |
| `input_video` | the same; or `input_video`: a URL, `{data, format}`, `{url}` or `{file_id}` |
| `video` | `video`: the same; or a list of pictures, which are the frames |
| `file`, `input_file` | `file_data`, `file_url` or `file_id` of a video |

A picture of a list is a URL, or an object with one in `url`, `image_url` or `image`.
"""

from collections.abc import Mapping
from typing import Any

from server.errors import InvalidImageUrl
from server.request.dialects.base import (
    Part,
    data_source,
    file_source,
    given_options,
    reference,
    source_of,
    uploaded,
    uuid_of,
)
from server.request.media import MediaRef, Pictures, SentBefore, Single, Source
from server.request.options import VIDEO_OPTIONS, sampling_options

VIDEO_KEYS = ("video_url", "input_video", "video")
"""Of the part, where its video may stand."""

_MEDIA_TYPES = ("format", "mime_type", "media_type")
VIDEO_READ_KEYS = frozenset({*VIDEO_KEYS, *VIDEO_OPTIONS, *_MEDIA_TYPES, "data"})
"""What is read of such a part."""

_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")


def video_of(part: Part) -> MediaRef:
    """The video of a part.

    Raises:
        ClientError: it has none, or a wrong option.
    """
    key = next((key for key in VIDEO_KEYS if part.node.get(key) is not None), None)
    holder = part.node if key is None else part.node[key]
    path = part.path if key is None else f"{part.path}.{key}"
    source = _source(holder, part, path)
    if source is None and uuid_of(part) is not None:
        return video_reference("uuid" if key is None else key, SentBefore(), part, holder)
    if source is None:
        missing = path if key is not None else f"{part.path}.{part.node.get('type', VIDEO_KEYS[0])}"
        raise InvalidImageUrl("the part has no video: no URL, data or file_id", param=missing)
    return video_reference(key, source, part, holder)


def video_reference(key: str | None, source: Source, part: Part, *holders: object) -> MediaRef:
    """The reference of a video in `key` of the part, or in the part itself.

    Raises:
        ClientError: a wrong option, or a wrong uuid.
    """
    path = part.path if key is None else f"{part.path}.{key}"
    sampling = sampling_options(*given_options(VIDEO_OPTIONS, part, *holders))
    return MediaRef("video", path, source, uuid=uuid_of(part), role=part.role, sampling=sampling)


def file_reference(key: str | None, holder: Mapping[str, Any], part: Part) -> MediaRef:
    """The file of a part, which may turn out to be a video: in `key` of the part, or in the part
    itself. One that says so is a video from the beginning.

    Raises:
        ClientError: it has no file, or a wrong option.
    """
    path = part.path if key is None else f"{part.path}.{key}"
    is_video = _says_video(holder) or _says_video(part.node)
    source = file_source(holder, part, path)
    if is_video:
        return video_reference(key, source, part, holder)
    ref = reference("file", path, source, part, holder)
    ref.sampling = sampling_options(*given_options(VIDEO_OPTIONS, part, holder))
    return ref


def says_video(media_type: object) -> bool:
    """Whether a media type, or a data URL, is that of a video."""
    if not isinstance(media_type, str):
        return False
    return media_type[:64].strip().lower().removeprefix("data:").startswith("video/")


def _says_video(holder: Mapping[str, Any]) -> bool:
    if any(says_video(holder.get(key)) for key in (*_MEDIA_TYPES, "file_data")):
        return True
    names = (holder.get("filename"), holder.get("file_url"))
    return any(isinstance(name, str) and name.lower().endswith(_SUFFIXES) for name in names)


def _source(holder: object, part: Part, path: str) -> Source | None:
    """None if `holder` has no video."""
    if isinstance(holder, list):
        frames = (_frame(item, part, f"{path}[{index}]") for index, item in enumerate(holder))
        return Pictures(tuple(frames))
    if not isinstance(holder, dict):
        return source_of(holder, part, path)
    if holder.get("data"):
        return data_source(holder["data"], part, f"{path}.data")
    url = holder.get("url")
    if isinstance(url, list):
        return _source(url, part, path)
    return source_of(url, part, path) if url is not None else uploaded(holder)


def _frame(item: object, part: Part, path: str) -> Single:
    """A picture of a list.

    Raises:
        InvalidImageUrl: it has none.
    """
    if isinstance(item, dict):
        holder = next((item[key] for key in ("image_url", "image") if item.get(key)), item)
        if (stored := uploaded(holder)) is not None:
            return stored
        item = holder.get("url") if isinstance(holder, dict) else holder
    source = source_of(item, part, path)
    assert isinstance(source, Single)
    return source

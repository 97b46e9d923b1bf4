"""The image and file parts of a request, in the dialects of the APIs, and what they ask for.

| API | image | file |
| --- | --- | --- |
| chat completions | `image_url`: a URL or `{url, detail, ...}` | `file`: `{file_data, ...}` |
| responses | `input_image`: `image_url`, `detail`, ... | `input_file`: `file_data` or `file_url` |
| messages | `image`: `source` | `document`: `source` |

In the place of a URL or of data, each may have the `file_id` of an uploaded file; for chat
completions, `image_file`: `{file_id, detail, ...}` is an image as well. An id is shown as a URL,
`saccade-file:<id>`. A client may write that itself: ids are looked up in the client's own group.

`detail`, `max_tokens` and `frames` (of a file: `pages`) may stand beside the URL or in the part. A
part that has some is rewritten: its URL is prefixed with its options, by which the loader sees
them whatever lies between.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, urlencode

from server.errors import ClientError, InvalidFile, InvalidImageUrl
from server.imaging.encoded import ImageOptions
from server.imaging.tokens import Detail

_SCHEME = "saccade:"
STORED_SCHEME = "saccade-file"
_OPTIONS = ("detail", "max_tokens", "frames", "pages")
# Keys of a request whose values only look like parts.
_NOT_SEARCHED = frozenset({"tools", "functions", "response_format", "metadata", "text"})
_MAX_PAGES = 10_000


@dataclass(frozen=True)
class Part:
    """`node` is the part itself, `siblings` the list that it stands in. `name` is its URL or file
    data, or else its uuid. `path` leads to it from the root, dotted, as errors show it."""

    kind: Literal["image", "file"]
    path: str
    name: str
    node: dict[str, Any]
    siblings: list[Any] | None

    @property
    def has_data(self) -> bool:
        """Whether `name` tells where the bytes are, and is not a uuid."""
        return not self.path.endswith("uuid")

    @property
    def file_id(self) -> str | None:
        """The id of the uploaded file that the part is, if it is one."""
        scheme, _, file_id = self.name.partition(":")
        return file_id if scheme == STORED_SCHEME and self.has_data else None


def parts_of(document: Any) -> Iterator[Part]:
    """Each image or file part of a parsed request, in order."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key not in _NOT_SEARCHED:
                yield from _walk(value, key, None)


def _walk(node: Any, path: str, siblings: list[Any] | None) -> Iterator[Part]:
    if isinstance(node, list):
        for index, item in enumerate(list(node)):
            yield from _walk(item, f"{path}[{index}]", node)
    elif isinstance(node, dict):
        part = _image(node, path, siblings) or _file(node, path, siblings)
        if part is not None:
            yield part
        else:
            for key, value in node.items():
                yield from _walk(value, f"{path}.{key}", None)


def _image(node: dict[str, Any], path: str, siblings: list[Any] | None) -> Part | None:
    url, kind = node.get("image_url"), node.get("type")
    if isinstance(url, dict):
        url = url.get("url")
    source = node.get("source")
    if isinstance(url, str):
        return Part("image", f"{path}.image_url", url, node, siblings)
    for holder, key in (
        (node.get("image_url"), "image_url"),
        (node.get("image_file"), "image_file"),
        (node if kind == "input_image" else None, "file_id"),
    ):
        if stored := _stored_name(holder):
            return Part("image", f"{path}.{key}", stored, node, siblings)
    if kind == "image_url" and isinstance(node.get("uuid"), str):
        return Part("image", f"{path}.uuid", node["uuid"], node, siblings)
    if kind == "image" and isinstance(source, dict):
        return Part("image", f"{path}.source", _source_name(source), node, siblings)
    return None


def _file(node: dict[str, Any], path: str, siblings: list[Any] | None) -> Part | None:
    kind, source = node.get("type"), node.get("source")
    if kind == "file" and isinstance(node.get("file"), dict):
        return Part("file", f"{path}.file", _file_name(node["file"]), node, siblings)
    if kind == "input_file":
        return Part("file", path, _file_name(node), node, siblings)
    if kind == "document" and isinstance(source, dict) and source.get("type") != "text":
        return Part("file", f"{path}.source", _source_name(source), node, siblings)
    return None


def _source_name(source: dict[str, Any]) -> str:
    return str(source.get("data") or source.get("url") or _stored_name(source))


def _file_name(holder: dict[str, Any]) -> str:
    return str(holder.get("file_data") or holder.get("file_url") or _stored_name(holder))


def _stored_name(holder: Any) -> str:
    """The URL of the uploaded file that `holder` names, or "" if it names none."""
    file_id = holder.get("file_id") if isinstance(holder, dict) else None
    return f"{STORED_SCHEME}:{file_id}" if isinstance(file_id, str) else ""


# ---------------------------------------------------------------------- what a part asks for


@dataclass(frozen=True)
class Wish:
    """What a part asks for: `options` for each of its images, and which `frames` of an animation
    or pages of a file, as numbers from 0, or how many spread over all of them."""

    options: ImageOptions
    frames: tuple[int, ...] | int | None = None


def take_wish(part: Part) -> Wish | None:
    """Read the options of `part` and remove them from it; None if it has none.

    Raises:
        ClientError: a value is not what its option takes; `param` names it.
    """
    nested = (part.node.get(key) for key in ("image_url", "image_file", "file"))
    holders = [value for value in (*nested, part.node) if isinstance(value, dict)]
    given: dict[str, Any] = {}
    for holder in holders:
        for key in _OPTIONS:
            value = holder.get(key)
            if key in holder and not (key == "detail" and part.node.get("type") == "input_image"):
                del holder[key]
            if value is not None:
                given.setdefault(key, value)
    if not given:
        return None
    options = ImageOptions(_detail(given, part), _max_tokens(given, part))
    frames = _pages(given, part) if part.kind == "file" else _frames(given, part)
    return None if (options, frames) == (ImageOptions(), None) else Wish(options, frames)


def _detail(given: dict[str, Any], part: Part) -> Detail:
    value = given.get("detail", "auto")
    if value == "original":  # as the responses API calls it
        return "high"
    if value not in get_args(Detail):
        raise _wrong(part, "detail", "must be one of 'auto', 'low' and 'high'")
    detail: Detail = value
    return detail


def _max_tokens(given: dict[str, Any], part: Part) -> int | None:
    value = given.get("max_tokens")
    if value is not None and not is_positive(value):
        raise _wrong(part, "max_tokens", "must be a positive integer")
    return value


def _frames(given: dict[str, Any], part: Part) -> tuple[int, ...] | int | None:
    value = given.get("frames")
    if value is None or is_positive(value):
        return value
    if isinstance(value, list) and value and all(_is_index(item) for item in value):
        return tuple(value)
    raise _wrong(part, "frames", "must be a positive integer or a list of frame numbers from 0")


def _pages(given: dict[str, Any], part: Part) -> tuple[int, ...] | None:
    """Page numbers from 0 of a list of numbers from 1, or of a text such as "1-3,7"."""
    value = given.get("pages")
    if value is None:
        return None
    texts = [str(item) for item in value] if isinstance(value, list) else str(value).split(",")
    pages: list[int] = []
    for text in texts:
        first, dash, last = (piece.strip() for piece in text.partition("-"))
        bounds = (first, last if dash else first)
        if not all(bound.isascii() and bound.isdigit() and len(bound) <= 6 for bound in bounds):
            raise _wrong(part, "pages", 'must be page numbers from 1, such as "1-3,7"')
        start, end = int(bounds[0]), int(bounds[1])
        if start < 1 or end < start:
            raise _wrong(part, "pages", 'must be page numbers from 1, such as "1-3,7"')
        pages += range(start - 1, min(end, start + _MAX_PAGES))
        if len(pages) > _MAX_PAGES:
            raise _wrong(part, "pages", f"must name at most {_MAX_PAGES} pages")
    return tuple(pages)


def is_positive(value: Any) -> bool:
    """Whether `value` is an integer above 0; JSON's `true` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_index(value: Any) -> bool:
    return value == 0 or is_positive(value)


def _wrong(part: Part, option: str, what: str) -> ClientError:
    return ClientError(f"{option} {what}", param=f"{part.path}.{option}")


# ---------------------------------------------------------------------- rewriting


def with_options(name: str, options: ImageOptions) -> str:
    """`name` (a URL or a uuid) with `options` before it."""
    values = {"detail": options.detail, "max_tokens": options.max_tokens, "frame": options.frame}
    given = {key: value for key, value in values.items() if value not in ("auto", None, 0)}
    return f"{_SCHEME}{urlencode(given)},{name}" if given else name


def split_options(name: str) -> tuple[str, ImageOptions]:
    """What `with_options` put together.

    Raises:
        InvalidImageUrl: it did not; a client wrote it where nobody looked for it.
    """
    if not name.startswith(_SCHEME):
        return name, ImageOptions()
    query, _, rest = name.removeprefix(_SCHEME).partition(",")
    given = dict(parse_qsl(query))
    numbers = (given.get("max_tokens", "1"), given.get("frame", "0"))
    if not all(text.isascii() and text.isdigit() and len(text) <= 9 for text in numbers):
        raise InvalidImageUrl("the image URL must be a data, http, https or file URL")
    max_tokens = int(given["max_tokens"]) if "max_tokens" in given else None
    detail: Any = given.get("detail", "auto")
    return rest, ImageOptions(detail, max_tokens, int(given.get("frame", 0)))


def refuse_forged(part: Part) -> None:
    """Raises InvalidImageUrl if a client wrote what only `with_options` may write."""
    if part.name.startswith(_SCHEME):
        raise InvalidImageUrl("the image URL must be a data, http, https or file URL",
                              param=part.path)  # fmt: skip


def url_of(part: Part) -> str:
    """The URL of an image part, also where the dialect gives type and data apart."""
    source = part.node.get("source")
    if part.file_id is not None or not isinstance(source, dict) or source.get("type") == "url":
        return part.name
    return f"data:{source.get('media_type', 'image/jpeg')};base64,{part.name}"


def set_name(part: Part, name: str) -> None:
    """Make `name` the URL or uuid of `part`, in its dialect."""
    node = part.node
    if not part.has_data:
        node["uuid"] = name
    elif isinstance(node.get("image_url"), dict):
        node["image_url"]["url"] = name
        node["image_url"].pop("file_id", None)
    elif "image_file" in node:
        del node["image_file"]
        node |= {"type": "image_url", "image_url": {"url": name}}
    elif "image_url" in node or node.get("type") == "input_image":
        node["image_url"] = name
        node.pop("file_id", None)
    else:
        node["source"] = {"type": "url", "url": name}


def image_like(part: Part, url: str) -> dict[str, Any]:
    """An image part for `url`, in the dialect of `part`."""
    kind = part.node.get("type")
    if kind in ("input_file", "input_image"):
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    if kind in ("document", "image"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    return {"type": "image_url", "image_url": {"url": url}}


def file_url(part: Part) -> str:
    """Where the bytes of a file part are: a data or http(s) URL, or that of an uploaded file.

    Raises:
        InvalidFile: the part has neither data, nor a URL, nor an id.
    """
    if not part.name:
        raise InvalidFile("the file part has no file_data and no file_id", param=part.path)
    if part.file_id is not None:
        return part.name
    source = part.node.get("source")
    if isinstance(source, dict):
        is_data = source.get("type") != "url"
    else:
        is_data = part.name[:5].lower() not in ("data:", "http:", "https")
    return f"data:application/pdf;base64,{part.name}" if is_data else part.name

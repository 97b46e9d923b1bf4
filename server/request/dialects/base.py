"""What the dialects have in common: content lists, the parts in them, and handles in their place.

document -> content lists -> parts -> MediaRef, one a slot -> (loaded) -> handles in the slots
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server.errors import ClientError, InvalidFile, InvalidImageUrl
from server.request.media import Inline, Kind, MediaRef, Remote, SentBefore, Source, Uploaded
from server.request.options import OPTIONS, frames_of, image_options, includes_text, pages_of
from server.request.payloads import Payloads

MAX_UUID_CHARS = 1024

Write = Callable[[str], Any]
"""Takes a handle and returns the part that stands for it."""


class ContentList(NamedTuple):
    """A list of content parts and its path. `role` is that of its message, where it has one.
    `bare` reads what stands in it as a bare text, where that is a URL and not a text."""

    path: str
    parts: list[Any]
    role: str | None = None
    bare: "Callable[[Part], tuple[MediaRef, Write]] | None" = None


@dataclass(eq=False)
class Slot:
    """The place of one media part, `parts[index]`, and what will stand there.

    `ref` and `write` are None where the part only turns into other parts, such as texts. `nodes`
    makes them, once the slots inside of them are filled.
    """

    parts: list[Any]
    index: int
    ref: MediaRef | None = None
    write: Write | None = None
    nodes: Callable[[], Sequence[Any]] = list


class Part(NamedTuple):
    """A part that is read: `node` at `path`. Readers take its payload from `payloads`."""

    node: dict[str, Any]
    path: str
    payloads: Payloads
    role: str | None = None


Read = Callable[[Part], tuple[MediaRef, Write]]
"""Reads a media part. Raises ClientError with `param`."""


def counted_as(ref: MediaRef) -> str:
    """The kind whose limit a media part counts for."""
    return "image" if ref.kind == "file" else ref.kind


@dataclass
class Found:
    """The slots of a document, inner ones before those around them. `changed`: something else was
    changed in it. `most` media parts of each kind are read, and one more: `is_over` then. Parts
    with the text of media have the type `text_type`."""

    slots: list[Slot] = field(default_factory=list)
    changed: bool = False
    most: Mapping[str, int] = field(default_factory=dict)
    text_type: str = "text"
    is_over: bool = False
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, parts: list[Any], index: int, read: tuple[MediaRef, Write]) -> None:
        """Add the slot of a media part."""
        self.slots.append(Slot(parts, index, *read))
        kind = counted_as(read[0])
        self._counts[kind] += 1
        self.is_over |= self._counts[kind] > self.most.get(kind, 0)

    @property
    def media(self) -> list[MediaRef]:
        return [slot.ref for slot in self.slots if slot.ref is not None]

    def fill(self, handles: Callable[[MediaRef], Sequence[str]]) -> None:
        """Put the parts for the handles of each media part in its place."""
        by_list: dict[int, list[Slot]] = {}
        for slot in self.slots:
            # Last those with the latest slot: a list inside of a part comes before that part's.
            slots = by_list.pop(id(slot.parts), [])
            slots.append(slot)
            by_list[id(slot.parts)] = slots
        for slots in by_list.values():
            _fill_list(slots, handles, self.text_type)


def _fill_list(
    slots: Sequence[Slot], handles: Callable[[MediaRef], Sequence[str]], text_type: str
) -> None:
    """Fill all slots of one list, in the order of the list, by building it anew once."""
    parts = slots[0].parts
    filled: list[Any] = []
    done = 0
    for slot in slots:
        filled += parts[done : slot.index]
        if slot.ref is not None and slot.write is not None:
            for handle, text in zip(handles(slot.ref), slot.ref.texts_before(), strict=True):
                if text is not None:
                    filled.append({"type": text_type, "text": text})
                filled.append(slot.write(handle))
        else:
            filled += slot.nodes()
        done = slot.index + 1
    parts[:] = filled + parts[done:]


@dataclass(frozen=True)
class Dialect:
    """The table of a dialect.

    Attributes:
        lists: finds the content lists of a document.
        media: by its type, how a media part is read.
        texts: types of parts without media, which stay as they are.
        embeddings: types of parts that carry embeddings. They pass where the server takes them.
        type_of: the type of a part.
        refuse: refuses a part where its place allows no media; None: all places do.
        special: turns a part into slots by itself, where it is not simply one of these; returns
            whether it did.
        complete: adds to a document what clients may leave out; returns whether it did.
        text_type: the type of a part with a text of the user.
    """

    lists: Callable[[Mapping[str, Any]], Iterator[ContentList]]
    media: Mapping[str, Read]
    texts: frozenset[str]
    type_of: Callable[[dict[str, Any]], object]
    embeddings: frozenset[str] = frozenset()
    refuse: Callable[[Part], None] | None = None
    special: Callable[[Part, ContentList, int, "Dialect", Found], bool] | None = None
    complete: Callable[[dict[str, Any]], bool] | None = None
    text_type: str = "text"

    def find(
        self,
        document: Mapping[str, Any],
        payloads: Payloads,
        embeddings: frozenset[str],
        most: Mapping[str, int],
    ) -> Found:
        """The media parts of `document`, up to the first one over `most` of its kind;
        `embeddings` are the types of embeddings that the server takes.

        Raises:
            ClientError: a part that the dialect does not know, or a value in one that is wrong.
        """
        found = Found(most=most, text_type=self.text_type)
        for content in self.lists(document):
            self.read_list(content, payloads, embeddings, found)
        return found

    def read_list(
        self,
        content: ContentList,
        payloads: Payloads,
        embeddings: frozenset[str],
        found: Found,
    ) -> None:
        """Add the slots of one content list to `found`."""
        for index, node in enumerate(content.parts):
            if found.is_over:
                return
            path = f"{content.path}[{index}]"
            if isinstance(node, str):
                if content.bare is not None:
                    part = Part({"url": node}, path, payloads)
                    found.add(content.parts, index, content.bare(part))
                continue
            if not isinstance(node, dict):
                raise ClientError("a content part must be an object", param=path)
            kind = self.type_of(node)
            kind = kind if kind is None or isinstance(kind, str) else ""
            part = Part(node, path, payloads, content.role)
            if kind in self.texts:
                if "uuid" in node:  # with one, vLLM looks for media in any part
                    del node["uuid"]
                    found.changed = True
                continue
            if self.special is not None and self.special(part, content, index, self, found):
                continue
            read = self.media.get(kind) if kind else None
            if read is not None:
                if self.refuse is not None:
                    self.refuse(part)
                found.add(content.parts, index, read(part))
            elif kind not in self.embeddings & embeddings:
                raise self._refusal(kind, path)

    def _refusal(self, kind: str | None, path: str) -> ClientError:
        if kind in self.embeddings:
            flag = "--enable-prompt-embeds" if kind == "prompt_embeds" else "--enable-mm-embeds"
            message = f"{kind} parts are not accepted; the server was started without {flag}"
        elif kind is None:
            message = "the content part has no type"
        else:
            known = ", ".join(sorted({*self.texts, *self.media}))
            message = f"content parts of this type are not accepted; the types are {known}"
        return ClientError(message, param=f"{path}.type")


# ---------------------------------------------------------------------- sources


def source_of(text: object, part: Part, path: str) -> Source:
    """Where a URL leads; `path` is the place of the URL.

    Raises:
        InvalidImageUrl: it is empty, not a text, or of another scheme.
    """
    if not isinstance(text, str):
        raise InvalidImageUrl("the URL must be a string", param=path)
    payload = part.payloads.claim(text)
    if isinstance(payload, memoryview):
        return Inline(payload)
    url = text.strip()
    if not url:
        raise InvalidImageUrl("the URL is empty", param=path)
    scheme = url[:6].partition(":")[0].lower()
    if scheme == "data":
        return Inline(url)
    if scheme in ("http", "https", "file"):
        return Remote(url)
    raise InvalidImageUrl("the URL must be a data, http, https or file URL", param=path)


def data_source(text: object, part: Part, path: str) -> Inline:
    """Base64 that stands for itself, or a `data:` URL where base64 belongs.

    Raises:
        InvalidImageUrl: it is empty, or not a text.
    """
    if not isinstance(text, str) or not text.strip():
        raise InvalidImageUrl("the data must be base64", param=path)
    return Inline(part.payloads.claim(text))


def file_source(holder: Mapping[str, Any], part: Part, path: str) -> Source:
    """The source of `holder`: its `file_data`, its `file_url` or its `file_id`.

    Raises:
        InvalidFile: it has none of them.
    """
    data, url = holder.get("file_data"), holder.get("file_url")
    if data:
        if isinstance(data, str) and data.lstrip()[:5].lower() in ("http:", "https"):
            return source_of(data, part, f"{path}.file_data")
        return data_source(data, part, f"{path}.file_data")
    if url:
        return source_of(url, part, f"{path}.file_url")
    stored = uploaded(holder)
    if stored is None:
        raise InvalidFile("the file part has no file_data and no file_id", param=path)
    return stored


def uploaded(holder: object) -> Uploaded | None:
    """The uploaded file that `holder` names, if it does."""
    file_id = holder.get("file_id") if isinstance(holder, dict) else None
    return Uploaded(file_id) if isinstance(file_id, str) and file_id else None


def anthropic_source(source: object, part: Part) -> Source:
    """The `source` of a block.

    Raises:
        ClientError: it is not an object, or has neither data, nor a URL, nor a file's id.
    """
    path = f"{part.path}.source"
    if not isinstance(source, dict):
        raise ClientError("the source must be an object", param=path)
    if (stored := uploaded(source)) is not None and not source.get("data"):
        return stored
    if source.get("type") == "url":
        return source_of(source.get("url"), part, f"{path}.url")
    return data_source(source.get("data"), part, f"{path}.data")


# ---------------------------------------------------------------------- references


def reference(
    kind: Kind,
    path: str,
    source: Source,
    part: Part,
    *holders: object,
) -> MediaRef:
    """A reference with the options in the part and in `holders`, whose options come first.

    Raises:
        ClientError: a wrong option, or a wrong uuid.
    """
    given, paths = given_options(OPTIONS, part, *holders)
    options = image_options(given, paths)
    key = "pages" if kind == "file" else "frames"
    frames = pages_of(given, paths) if kind == "file" else frames_of(given, paths)
    uuid = uuid_of(part)
    if uuid is not None and frames is not None:
        raise ClientError(
            f"a part with a uuid is one image: it cannot have {key}", param=paths[key]
        )
    with_text = includes_text(given, paths)
    if uuid is not None and with_text:
        raise ClientError(
            "a part with a uuid is one image: it cannot have include_text",
            param=paths["include_text"],
        )
    return MediaRef(kind, path, source, options, frames, uuid, part.role, with_text)


def given_options(
    names: Sequence[str], part: Part, *holders: object
) -> tuple[dict[str, Any], dict[str, str]]:
    """Those of the options `names` that stand in `holders` or in the part, and their paths."""
    given: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for holder in (*holders, part.node):
        if isinstance(holder, dict):
            for key in names:
                if holder.get(key) is not None and key not in given:
                    given[key], paths[key] = holder[key], f"{_path_of(holder, part)}.{key}"
    return given, paths


def _path_of(holder: dict[str, Any], part: Part) -> str:
    """The path of `holder`, which is the part or one of its values."""
    key = next((key for key, value in part.node.items() if value is holder), None)
    return part.path if key is None else f"{part.path}.{key}"


def read_bare_url(part: Part) -> tuple[MediaRef, Write]:
    """A URL that stands where others have parts; so does its handle."""
    source = source_of(part.node["url"], part, part.path)
    return MediaRef("image", part.path, source), lambda handle: handle


def uuid_of(part: Part) -> str | None:
    """The client's own name for the part.

    Raises:
        ClientError: it is not a text, or too long.
    """
    uuid = part.node.get("uuid")
    if uuid is None:
        return None
    if not isinstance(uuid, str) or not uuid or len(uuid) > MAX_UUID_CHARS:
        raise ClientError(
            f"uuid must be a text of 1 to {MAX_UUID_CHARS} characters", param=f"{part.path}.uuid"
        )
    return uuid


def sent_before(kind: Kind, part: Part, *holders: object) -> MediaRef | None:
    """The reference of a part that has a uuid and nothing else."""
    if uuid_of(part) is None:
        return None
    return reference(kind, f"{part.path}.uuid", SentBefore(), part, *holders)

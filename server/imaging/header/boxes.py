"""Boxes of HEIF and AVIF files, and the properties of their primary item.

ISO/IEC 14496-12, 4.2; ISO/IEC 23008-12, 6.2 and 9.3. No list is followed for more than `MAX_STEPS`
entries.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from server.errors import InvalidImage
from server.imaging.header.base import MAX_STEPS, damaged

_HEAD = struct.Struct(">I4s")
_LARGE = struct.Struct(">Q")

# The length of the version and flags at the start of a "full" box.
FULL = 4


class Box(NamedTuple):
    """The type of a box, and the offsets of its contents."""

    kind: bytes
    start: int
    end: int


def whole(data: bytes) -> Box:
    """The file as if it were a box."""
    return Box(b"file", 0, len(data))


def boxes(data: bytes, parent: Box, skip: int = 0) -> Iterator[Box]:
    """At most `MAX_STEPS` boxes in `parent`, after `skip` bytes of fields.

    Raises:
        InvalidImage: a box reaches beyond `parent`.
    """
    start = parent.start + skip
    for _ in range(MAX_STEPS):
        if parent.end - start < _HEAD.size:
            return
        size, kind = _HEAD.unpack_from(data, start)
        contents = start + _HEAD.size
        if size == 1:
            (size,) = _LARGE.unpack_from(data, contents)
            contents += _LARGE.size
        elif size == 0:
            size = parent.end - start
        start += size
        if not contents <= start <= parent.end:
            raise damaged("HEIF or AVIF", "a box reaches beyond its parent")
        yield Box(kind, contents, start)


def children(data: bytes, parent: Box, skip: int = 0) -> dict[bytes, Box]:
    """The first box of each type in `parent`."""
    found: dict[bytes, Box] = {}
    for box in boxes(data, parent, skip):
        found.setdefault(box.kind, box)
    return found


def child(data: bytes, parent: Box, kind: bytes, skip: int = 0) -> Box:
    """The first box of type `kind` in `parent`.

    Raises:
        InvalidImage: `parent` has no such box.
    """
    for box in boxes(data, parent, skip):
        if box.kind == kind:
            return box
    raise missing(kind)


def missing(kind: bytes) -> InvalidImage:
    """The error for a file without a required box."""
    return damaged("HEIF or AVIF", f"a {kind.decode()!r} box is missing")


def id_bytes(data: bytes, box: Box) -> int:
    """The width in bytes of item numbers and counts in a box: 2, or 4 after version 0."""
    return 4 if data[box.start] > 0 else 2


def unsigned(data: bytes, start: int, size: int) -> int:
    """The big-endian number of `size` bytes at `start`.

    Raises:
        IndexError: the data ends before it.
    """
    if start + size > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + size])


@dataclass
class Fields:
    """Reads consecutive numbers from the offset `at`."""

    data: bytes
    at: int

    def take(self, size: int) -> int:
        value = unsigned(self.data, self.at, size)
        self.at += size
        return value


# ---------------------------------------------------------------------- the primary item

# Files have one list for all items, or one for each width of numbers.
_MAX_LISTS = 4


def primary_item(data: bytes, parts: dict[bytes, Box]) -> int:
    """The number of the primary item; `parts` are the boxes in `meta`.

    Raises:
        InvalidImage: the file has no primary item.
    """
    box = parts.get(b"pitm")
    if box is None:
        raise missing(b"pitm")
    return unsigned(data, box.start + FULL, id_bytes(data, box))


def primary_properties(data: bytes, parts: dict[bytes, Box]) -> list[Box]:
    """The property boxes of the primary item, in the order of their application.

    Raises:
        InvalidImage: there are no properties, or the item refers to one that does not exist.
    """
    item = primary_item(data, parts)
    if b"iprp" not in parts:
        raise missing(b"iprp")
    lists = list(boxes(data, parts[b"iprp"]))
    known = list(boxes(data, child(data, parts[b"iprp"], b"ipco")))
    indices: list[int] = []
    for box in [box for box in lists if box.kind == b"ipma"][:_MAX_LISTS]:
        indices += _associated(data, box, item)
    if any(index > len(known) for index in indices):
        raise damaged("HEIF or AVIF", "it refers to a property that does not exist")
    return [known[index - 1] for index in indices if index]


def _associated(data: bytes, ipma: Box, item: int) -> list[int]:
    """The numbers (from 1; 0 means none) of the properties that `ipma` assigns to `item`."""
    number_bytes = id_bytes(data, ipma)
    bytes_each, mask = (2, 0x7FFF) if data[ipma.start + 3] & 1 else (1, 0x7F)
    fields = Fields(data, ipma.start + FULL)
    for _ in range(min(fields.take(4), MAX_STEPS)):
        if fields.at >= ipma.end:
            break
        number = fields.take(number_bytes)
        length = fields.take(1)
        if number == item:
            return [fields.take(bytes_each) & mask for _ in range(length)]
        fields.at += length * bytes_each
    return []

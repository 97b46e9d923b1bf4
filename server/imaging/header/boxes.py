"""The boxes that HEIF and AVIF files are made of, and the properties of their primary item.

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

# The bytes of version and flags with which a "full" box begins.
FULL = 4


class Box(NamedTuple):
    """A box's type, and its contents from `start` up to `end`."""

    kind: bytes
    start: int
    end: int


def whole(data: bytes) -> Box:
    """The file as if it were a box."""
    return Box(b"file", 0, len(data))


def boxes(data: bytes, parent: Box, skip: int = 0) -> Iterator[Box]:
    """The boxes in `parent`, behind its own fields of `skip` bytes; at most `MAX_STEPS` of them.

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
        InvalidImage: there is none.
    """
    for box in boxes(data, parent, skip):
        if box.kind == kind:
            return box
    raise missing(kind)


def missing(kind: bytes) -> InvalidImage:
    return damaged("HEIF or AVIF", f"there is no {kind.decode()!r} box where one must be")


def id_bytes(data: bytes, box: Box) -> int:
    """The bytes of an item's number, or of a count, in a box that widens them after version 0."""
    return 4 if data[box.start] > 0 else 2


def unsigned(data: bytes, start: int, size: int) -> int:
    """The number in `size` bytes from `start` on.

    Raises:
        IndexError: the data ends before.
    """
    if start + size > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + size])


@dataclass
class Fields:
    """Numbers that follow one another from the offset `at` on."""

    data: bytes
    at: int

    def take(self, size: int) -> int:
        value = unsigned(self.data, self.at, size)
        self.at += size
        return value


# ---------------------------------------------------------------------- the primary item

# There is one list for all items, or one for each width of their numbers.
_MAX_LISTS = 4


def primary_item(data: bytes, parts: dict[bytes, Box]) -> int:
    """The number of the item that is the picture; `parts` are the boxes in `meta`.

    Raises:
        InvalidImage: the file does not name one.
    """
    box = parts.get(b"pitm")
    if box is None:
        raise missing(b"pitm")
    return unsigned(data, box.start + FULL, id_bytes(data, box))


def primary_properties(data: bytes, parts: dict[bytes, Box]) -> list[Box]:
    """The property boxes of the primary item, in the order in which they are to be applied.

    Raises:
        InvalidImage: there are none, or one does not exist.
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
        raise damaged("HEIF or AVIF", "a property that does not exist")
    return [known[index - 1] for index in indices if index]


def _associated(data: bytes, ipma: Box, item: int) -> list[int]:
    """The numbers (from 1 on; 0 for none) of the properties that `ipma` gives to `item`."""
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

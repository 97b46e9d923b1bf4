"""The boxes that HEIF and AVIF files are made of (ISO/IEC 14496-12, 4.2)."""

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
            raise damaged("HEIF or AVIF", "a box reaches beyond the one that it is in")
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

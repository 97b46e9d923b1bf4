"""TIFF and BigTIFF: size and orientation of the first page; orientation from EXIF and XMP.

A file's header leads to its first directory of tagged values (TIFF 6.0, sections 2 and 8; BigTIFF
has wider fields). EXIF is a TIFF file without pixels. Both are read as Pillow reads them: if EXIF
has no orientation, XMP's counts; if EXIF cannot be read at all, or is a BigTIFF, the picture is not
turned.
"""

import re
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from server.imaging.header.base import MAX_STEPS, MAX_TEXT_BYTES, ImageHeader, damaged

# The headers that Pillow accepts as TIFF, with the byte order that it assumes. Of the two BigTIFF
# headers (with a plus sign), it reads the second one as TIFF.
ORDERS = {
    b"II*\0": "<",
    b"II\0*": "<",
    b"II+\0": "<",
    b"MM\0*": ">",
    b"MM*\0": ">",
    b"MM\0+": ">",
}
_BIG = b"II+\0"
# Pillow skips a value at this offset or beyond; a value beyond the end of the file ends the
# directory.
_MAX_OFFSET = 1 << 63

# The size in bytes and the `struct` code of each type; the code is empty if it is not numeric.
_TYPES = {
    1: (1, ""),
    2: (1, ""),
    3: (2, "H"),
    4: (4, "L"),
    5: (8, "LL"),
    6: (1, "b"),
    7: (1, ""),
    8: (2, "h"),
    9: (4, "l"),
    10: (8, "ll"),
    11: (4, "f"),
    12: (8, "d"),
    13: (4, "L"),
    16: (8, "Q"),
}


class Span(NamedTuple):
    """A part of `data`, from `start` up to `end`."""

    data: bytes
    start: int
    end: int


class Value(NamedTuple):
    """The place of a directory's value; `type` is the TIFF type."""

    type: int
    start: int
    end: int


class Layout(NamedTuple):
    """The byte order and field sizes of a directory of TIFF or, if `big`, BigTIFF."""

    order: str
    big: bool
    length: struct.Struct
    entry: struct.Struct
    offset: struct.Struct


_LAYOUTS = {
    (order, big): Layout(
        order,
        big,
        struct.Struct(order + ("Q" if big else "H")),
        struct.Struct(order + ("HHQ8x" if big else "HHL4x")),
        struct.Struct(order + ("Q" if big else "L")),
    )
    for order in "<>"
    for big in (False, True)
}


@dataclass
class Directory:
    """The wanted values by tag; the offset of the next directory is stored at `next`."""

    layout: Layout
    offset: int
    values: dict[int, Value] = field(default_factory=dict)
    next: int | None = None

    def number(self, data: bytes, tag: int) -> int | float | None:
        """The first number of `tag`; None if there is none."""
        value = self.values.get(tag)
        code = _TYPES[value.type][1] if value else ""
        if value is None or not code:
            return None
        numbers: tuple[int | float, ...]
        numbers = struct.unpack_from(self.layout.order + code, data, value.start)
        if len(numbers) == 1:
            return numbers[0]
        numerator, denominator = numbers
        return numerator / denominator if denominator else None


def read_directory(span: Span, wanted: Collection[int]) -> Directory | None:
    """The first directory of a TIFF file; None if `span` does not begin with a TIFF header.

    A truncated directory has the values that can be read. At most `MAX_STEPS` entries are read.
    """
    data, start, end = span
    order = ORDERS.get(data[start : min(start + 4, end)])
    if order is None:
        return None
    layout = _LAYOUTS[order, data.startswith(_BIG, start)]
    first = start + (8 if layout.big else 4)
    if first + layout.offset.size > end:
        return None
    (offset,) = layout.offset.unpack_from(data, first)
    directory = Directory(layout, offset)
    if start + offset + layout.length.size > end:
        return directory
    (count,) = layout.length.unpack_from(data, start + offset)
    entries = start + offset + layout.length.size
    if _read_entries(span, directory, (entries, min(count, MAX_STEPS)), wanted):
        directory.next = entries + count * layout.entry.size
    return directory


def _read_entries(
    span: Span,
    directory: Directory,
    entries: tuple[int, int],
    wanted: Collection[int],
) -> bool:
    """Fill `directory` from `entries` (offset, count); returns False if the data ends too early.

    Values beyond a total size of the whole file are skipped, as in Pillow.
    """
    data, start, end = span
    layout = directory.layout
    at, count = entries
    seen = set()
    claimed = 0
    for _ in range(count):
        if at + layout.entry.size > end:
            return False
        tag, type_, number = layout.entry.unpack_from(data, at)
        at += layout.entry.size
        if tag in seen or type_ not in _TYPES:
            continue
        size = number * _TYPES[type_][0]
        place = at - layout.offset.size
        if size > layout.offset.size:
            (offset,) = layout.offset.unpack_from(data, place)
            if offset >= _MAX_OFFSET:
                continue
            claimed += size
            if claimed > end - start:
                continue
            place = start + offset
            if place + size > end:
                return False
        if size:
            seen.add(tag)
            if tag in wanted:
                directory.values[tag] = Value(type_, place, place + size)
    return True


# ---------------------------------------------------------------------- EXIF and XMP

ORIENTATION = 274
_TURNS = frozenset(range(1, 9))

_PREFIX = b"Exif\0\0"
_XMP_NAME = b"tiff:Orientation"
_XMP_ORIENTATION = re.compile(_XMP_NAME + b'(?:="|>)([0-9])')


def orientation(exif: Span | None, xmp: Span | None) -> int:
    """The orientation from EXIF, or else from XMP; 1 if there is none or EXIF cannot be read."""
    directory = None
    if exif is not None:
        exif = _without_prefix(exif)
        if exif.start < exif.end:
            directory = read_directory(exif, (ORIENTATION,))
            if directory is None or directory.layout.big:
                return 1
    return orientation_of(exif.data if exif else b"", directory, xmp)


def has_orientation(exif: Span) -> bool:
    """Whether EXIF has an orientation, valid or not."""
    directory = read_directory(_without_prefix(exif), (ORIENTATION,))
    return directory is not None and ORIENTATION in directory.values


def orientation_of(data: bytes, directory: Directory | None, xmp: Span | None) -> int:
    """The orientation, 1 to 8, from a directory of `data`, or else from XMP; 1 if it is invalid."""
    found: int | float | None = None
    if directory is not None and ORIENTATION in directory.values:
        found = directory.number(data, ORIENTATION)
    elif xmp is not None:
        found = _in_xmp(xmp)
    return int(found) if found in _TURNS else 1


def _without_prefix(exif: Span) -> Span:
    data, start, end = exif
    for _ in range(2):
        if data.startswith(_PREFIX, start, end):
            start += len(_PREFIX)
    return Span(data, start, end)


def _in_xmp(xmp: Span) -> int | None:
    """The first orientation in RDF notation in the first `MAX_TEXT_BYTES`."""
    data, start, end = xmp
    end = min(end, start + MAX_TEXT_BYTES)
    # Much faster than the regular expression if there is no orientation.
    start = data.find(_XMP_NAME, start, end)
    match = _XMP_ORIENTATION.search(data, start, end) if start >= 0 else None
    return int(match[1]) if match else None


# ---------------------------------------------------------------------- the first page

MAGIC = tuple(ORDERS)

_WIDTH, _HEIGHT, _XMP = 256, 257, 700


def read(data: bytes) -> ImageHeader:
    """Read the first page; `animated` if there is another one.

    Raises:
        InvalidImage: there is no directory, or it has no width or height.
    """
    wanted = (_WIDTH, _HEIGHT, ORIENTATION, _XMP)
    directory = read_directory(Span(data, 0, len(data)), wanted)
    if directory is None:
        raise damaged("TIFF", "it is truncated")
    width = directory.number(data, _WIDTH)
    height = directory.number(data, _HEIGHT)
    if not isinstance(width, int) or not isinstance(height, int):
        raise damaged("TIFF", "its first directory has no width or height")
    value = directory.values.get(_XMP)
    xmp = Span(data, value.start, value.end) if value else None
    turned = orientation_of(data, directory, xmp)
    return ImageHeader("TIFF", width, height, turned, _has_next(data, directory))


def _has_next(data: bytes, directory: Directory) -> bool:
    field = directory.layout.offset
    if directory.next is None or directory.next + field.size > len(data):
        return False
    (offset,) = field.unpack_from(data, directory.next)
    return offset not in (0, directory.offset)

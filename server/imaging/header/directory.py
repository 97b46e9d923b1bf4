"""The directories of tagged values in TIFF files, as Pillow reads them.

A file's header leads to its first directory (TIFF 6.0, section 2; BigTIFF has wider fields). EXIF
is a TIFF file without pixels.
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from server.imaging.header.base import MAX_STEPS

# The headers that Pillow takes for TIFF, with the byte order that it then assumes. Of the two that
# stand for BigTIFF (with a plus sign), it reads the second like TIFF.
ORDERS = {
    b"II*\0": "<",
    b"II\0*": "<",
    b"II+\0": "<",
    b"MM\0*": ">",
    b"MM*\0": ">",
    b"MM\0+": ">",
}
_BIG = b"II+\0"
# From here on Pillow passes over a value; one that is only behind the end ends the directory.
_MAX_OFFSET = 1 << 63

# Bytes of one value of a type, and its `struct` code; none where the value is no number.
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
    """Where a directory's value lies; `type` is TIFF's."""

    type: int
    start: int
    end: int


class Layout(NamedTuple):
    """Byte order and fields of a directory, of TIFF or (`big`) of BigTIFF."""

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
    """The wanted values by their tags; `next` is where the next directory's offset is stored."""

    layout: Layout
    offset: int
    values: dict[int, Value] = field(default_factory=dict)
    next: int | None = None

    def number(self, data: bytes, tag: int) -> int | float | None:
        """The first number under `tag`; None if there is none."""
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
    """The first directory of a TIFF file; None if `span` does not begin like one.

    Of a directory that is cut short, what can be read. At most `MAX_STEPS` entries are looked at.
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
    """Fill `directory` from `entries` (offset, count); False where the data ended too early.

    Values that together claim more than the whole file are passed over, as Pillow does.
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

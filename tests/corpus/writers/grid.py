"""A HEIF or AVIF file of several pictures and a grid that joins them."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.corpus.writers import boxes
from tests.corpus.writers.boxes import box, full


@dataclass(frozen=True)
class Grid:
    """`layout` in (columns, rows), `size` in pixels, the items in their order, and the size that
    the grid's property announces."""

    layout: tuple[int, int]
    size: tuple[int, int]
    references: Sequence[int]
    announced: tuple[int, int]


@dataclass(frozen=True)
class _Item:
    """`properties` are boxes that only this item has."""

    kind: bytes
    data: bytes
    properties: Sequence[bytes]


def grid(files: Sequence[bytes], made: Grid) -> bytes:
    """The pictures of `files` as items from 1 on, followed by the grid as the primary item."""
    tiles = [_item(data) for data in files]
    shared = [one for one in tiles[0].properties if one[4:8] in (b"pixi", b"colr")]
    ispe = full(b"ispe", struct.pack(">II", *made.announced))
    items = [*tiles, _Item(b"grid", _payload(made), [ispe, *shared])]
    at, size = boxes.find(files[0], b"ftyp")
    brand = files[0][at : at + size]
    head_bytes = len(brand) + len(_meta(items, made.references, 0)) + 8
    data = b"".join(item.data for item in items)
    return brand + _meta(items, made.references, head_bytes) + box(b"mdat", data)


def _item(data: bytes) -> _Item:
    """The only picture of a file."""
    at, size = boxes.find(data, b"mdat")
    ipco_at, ipco_size = boxes.find(data, b"ipco")
    places = boxes.walk(data, ipco_at + 8, ipco_at + ipco_size)
    properties = [data[start : start + length] for _, start, length in places]
    kind = b"av01" if any(one[4:8] == b"av1C" for one in properties) else b"hvc1"
    return _Item(kind, data[at + 8 : at + size], properties)


def _payload(made: Grid) -> bytes:
    columns, rows = made.layout
    return struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, *made.size)


def _meta(items: Sequence[_Item], references: Sequence[int], data_at: int) -> bytes:
    numbered = list(enumerate(items, 1))
    last = struct.pack(">H", len(items))
    entries = b"".join(
        full(b"infe", struct.pack(">HH", number, 0) + item.kind + b"\0", version=2)
        for number, item in numbered
    )
    tiles = struct.pack(f">{len(references)}H", *references)
    dimg = box(b"dimg", last + struct.pack(">H", len(references)) + tiles)
    return full(
        b"meta",
        full(b"hdlr", bytes(4) + b"pict" + bytes(13))
        + full(b"pitm", last)
        + _locations(items, data_at)
        + full(b"iinf", last + entries)
        + full(b"iref", dimg)
        + _properties(items),
    )


def _locations(items: Sequence[_Item], data_at: int) -> bytes:
    entries, at = b"", data_at
    for number, item in enumerate(items, 1):
        entries += struct.pack(">HHHII", number, 0, 1, at, len(item.data))
        at += len(item.data)
    return full(b"iloc", b"\x44\0" + struct.pack(">H", len(items)) + entries)


def _properties(items: Sequence[_Item]) -> bytes:
    associations, index = b"", 0
    for number, item in enumerate(items, 1):
        associations += struct.pack(">HB", number, len(item.properties))
        for one in item.properties:
            index += 1
            essential = 0x80 if one[4:8] in (b"hvcC", b"av1C") else 0
            associations += bytes([essential | index])
    ipco = box(b"ipco", b"".join(one for item in items for one in item.properties))
    return box(b"iprp", ipco + full(b"ipma", struct.pack(">I", len(items)) + associations))

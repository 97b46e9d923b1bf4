"""Boxes of ISO base media files, such as AVIF and HEIC."""

import struct
from collections.abc import Iterator

# Boxes that contain boxes, and the number of bytes before the first of them.
_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0}


def box(kind: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A box; `size` replaces the right size (0: to the end of the file)."""
    return struct.pack(">I", len(data) + 8 if size is None else size) + kind + data


def full(kind: bytes, data: bytes = b"", version: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24) + data)


def ftyp(brand: bytes, *compatible: bytes) -> bytes:
    return box(b"ftyp", brand + bytes(4) + b"".join(compatible or (brand,)))


def walk(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(kind, offset, size) of each box, a container before its contents."""
    at, end = start, len(data) if end is None else end
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        size = size or end - at
        yield kind, at, size
        if kind in _CONTAINERS:
            yield from walk(data, at + 8 + _CONTAINERS[kind], at + size)
        at += max(size, 8)


def find(data: bytes, kind: bytes) -> tuple[int, int]:
    """(offset, size) of the first box of a kind."""
    return next((at, size) for name, at, size in walk(data) if name == kind)


def with_payload(data: bytes, kind: bytes, payload: bytes) -> bytes:
    """`data` with other bytes at the start of the first box of a kind."""
    at, _ = find(data, kind)
    return data[: at + 8] + payload + data[at + 8 + len(payload) :]


def with_size(data: bytes, kind: bytes, size: int) -> bytes:
    """`data` in which the first box of a kind declares another size."""
    at, _ = find(data, kind)
    return data[:at] + struct.pack(">I", size) + data[at + 4 :]


def with_ispe(data: bytes, width: int, height: int) -> bytes:
    """`data` that declares another size; the encoded picture is unchanged."""
    return with_payload(data, b"ispe", struct.pack(">III", 0, width, height))


def with_property(data: bytes, prop: bytes, item: int = 1) -> bytes:
    """`data` with an additional essential property for item number `item`."""
    ipco_at, ipco_size = find(data, b"ipco")
    index = sum(1 for _ in walk(data, ipco_at + 8, ipco_at + ipco_size)) + 1
    ipco = box(b"ipco", data[ipco_at + 8 : ipco_at + ipco_size] + prop)
    iprp_at, iprp_size = find(data, b"iprp")
    iprp = box(b"iprp", ipco + box(b"ipma", _associated(data, item, index)))
    return _with_iprp(data, iprp_at, iprp_size, iprp)


def _associated(data: bytes, item: int, index: int) -> bytes:
    """The contents of `ipma` with property `index` added to `item` (version 0, small indices)."""
    at, size = find(data, b"ipma")
    held = data[at + 8 : at + size]
    position = 8  # after version, flags and the number of items
    while struct.unpack_from(">H", held, position)[0] != item:
        position += 3 + held[position + 2]
    end = position + 3 + held[position + 2]
    count = bytes([held[position + 2] + 1])
    return (
        held[: position + 2] + count + held[position + 3 : end] + bytes([0x80 | index]) + held[end:]
    )


def _with_iprp(data: bytes, at: int, size: int, iprp: bytes) -> bytes:
    """Insert a longer `iprp`, and shift the offsets in `iloc` of the data after `meta`."""
    added = len(iprp) - size
    grown = data[:at] + iprp + data[at + size :]
    meta_at, meta_size = find(data, b"meta")
    grown = grown[:meta_at] + struct.pack(">I", meta_size + added) + grown[meta_at + 4 :]
    return with_shifted_items(grown, meta_at + meta_size, added)


def with_shifted_items(data: bytes, beyond: int, by: int) -> bytes:
    """Add `by` to the offset of each item beyond `beyond` (`iloc` of version 0)."""
    at, _ = find(data, b"iloc")
    assert (data[at + 8], data[at + 12]) == (0, 0x44), "unsupported version of iloc"
    base_bytes = data[at + 13] >> 4
    position = at + 16
    for _ in range(struct.unpack_from(">H", data, at + 14)[0]):
        extent_at = position + 4 + base_bytes + 2
        extents, offset = struct.unpack_from(">HI", data, extent_at - 2)
        base = struct.unpack_from(">I", data, position + 4)[0] if base_bytes else 0
        if base + offset >= beyond:  # the base shifts all extents, and there is at most one
            where, number = (position + 4, base) if base else (extent_at, offset)
            data = data[:where] + struct.pack(">I", number + by) + data[where + 4 :]
        position = extent_at + 8 * extents
    return data

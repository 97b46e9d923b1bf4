"""EXIF and XMP of a HEIF file, by its items (ISO/IEC 14496-12, 8.11; ISO/IEC 23008-12, annex A).

No list is followed for more than `MAX_STEPS` entries.
"""

from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from server.imaging.header.base import MAX_STEPS
from server.imaging.header.boxes import FULL, Box, Fields, boxes, id_bytes, unsigned
from server.imaging.header.directory import Span

_EXIF = b"Exif"
_MIME = b"mime"
_XMP_TYPE = b"application/rdf+xml\0"

_MAX_NAME = 256

# The first version of an item's entry that has a type.
_TYPED = 2
# Where an item's offset counts from.
_IN_FILE, _IN_IDAT = 0, 1

# EXIF comes behind the offset of its TIFF header, which decoders do not heed.
_EXIF_OFFSET_BYTES = 4


class Metadata(NamedTuple):
    exif: Span | None = None
    xmp: Span | None = None


def metadata(data: bytes, parts: dict[bytes, Box], item: int | None = None) -> Metadata:
    """EXIF and XMP that describe `item`, or whatever; `parts` are the boxes in `meta`."""
    if b"iinf" not in parts or b"iloc" not in parts:
        return Metadata()
    described = None
    if item is not None:
        described = _describing(data, parts[b"iref"], item) if b"iref" in parts else ()
    items = _metadata_items(data, parts[b"iinf"], described)
    if not items:
        return Metadata()
    spans = _extents(data, parts, items.values())
    exif, xmp = (spans.get(items.get(kind, -1)) for kind in (_EXIF, _MIME))
    if exif is not None:
        exif = exif._replace(start=exif.start + _EXIF_OFFSET_BYTES)
    return Metadata(exif, xmp)


def _metadata_items(data: bytes, iinf: Box, among: Collection[int] | None) -> dict[bytes, int]:
    """The number of the last item of each type, EXIF ("Exif") and XMP ("mime")."""
    found = {}
    count_bytes = id_bytes(data, iinf)
    count = unsigned(data, iinf.start + FULL, count_bytes)
    for entry in islice(boxes(data, iinf, FULL + count_bytes), count):
        version = data[entry.start]
        if version < _TYPED:
            continue
        number_bytes = 2 if version == _TYPED else 4
        at = entry.start + FULL + number_bytes + 2  # two bytes of protection
        kind = data[at : at + 4]
        if kind not in (_EXIF, _MIME):
            continue
        name_end = data.find(b"\0", at + 4, min(entry.end, at + 4 + _MAX_NAME))
        if kind == _MIME and not data.startswith(_XMP_TYPE, name_end + 1, entry.end):
            continue
        number = unsigned(data, entry.start + FULL, number_bytes)
        if among is None or number in among:
            found[kind] = number
    return found


def _describing(data: bytes, iref: Box, item: int) -> set[int]:
    """The items that describe `item`."""
    size = id_bytes(data, iref)
    return {
        unsigned(data, reference.start, size)
        for reference in boxes(data, iref, FULL)
        if reference.kind == b"cdsc" and unsigned(data, reference.end - size, size) == item
    }


def _extents(data: bytes, parts: dict[bytes, Box], wanted: Collection[int]) -> dict[int, Span]:
    """Where the bytes of the `wanted` items are, if they are in the file and in one piece."""
    iloc = parts[b"iloc"]
    version = data[iloc.start]
    fields = Fields(data, iloc.start + FULL)
    sizes = fields.take(2)
    offset_bytes, length_bytes, base_bytes, index_bytes = (
        sizes >> shift & 15 for shift in (12, 8, 4, 0)
    )
    if version == 0:
        index_bytes = 0
    number_bytes = 4 if version == 2 else 2
    found = {}
    for _ in range(min(fields.take(number_bytes), MAX_STEPS)):
        if fields.at >= iloc.end:
            break
        number = fields.take(number_bytes)
        method = fields.take(2) & 15 if version > 0 else _IN_FILE
        fields.take(2)  # the file that the item is in; decoders take it to be this one
        base = fields.take(base_bytes)
        extents = fields.take(2)
        behind = fields.at + extents * (index_bytes + offset_bytes + length_bytes)
        if number in wanted and extents == 1:
            fields.take(index_bytes)
            start = base + fields.take(offset_bytes)
            found[number] = _span(data, parts, method, (start, fields.take(length_bytes)))
        fields.at = behind
    return {number: span for number, span in found.items() if span is not None}


def _span(data: bytes, parts: dict[bytes, Box], method: int, place: tuple[int, int]) -> Span | None:
    start, length = place
    end = len(data)
    if method == _IN_IDAT and b"idat" in parts:
        start += parts[b"idat"].start
        end = parts[b"idat"].end
    elif method != _IN_FILE:
        return None
    return Span(data, start, start + length) if start + length <= end else None

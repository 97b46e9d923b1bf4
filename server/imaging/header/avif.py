"""AVIF: the primary picture, or the first track of a sequence, as libavif and Pillow read it.

AV1 Image File Format 1.2. libavif does not crop, and turns before it mirrors. If the file has
neither property, Pillow turns the picture by its XMP, unless its EXIF has an orientation of any
value.
"""

import struct
from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from server.imaging.header.base import MAX_STEPS, ImageHeader
from server.imaging.header.boxes import (
    FULL,
    Box,
    Fields,
    boxes,
    child,
    children,
    id_bytes,
    missing,
    primary_item,
    primary_properties,
    unsigned,
    whole,
)
from server.imaging.header.heif import Picture, spatial_extents
from server.imaging.header.tiff import Span, has_orientation, orientation

_BRANDS = frozenset((b"avif", b"avis"))

# The accepted values of a file's first brand.
BRANDS = _BRANDS | {b"mif1", b"msf1"}
_MAX_BRANDS_BYTES = 256

# The offset of width and height, each 16.16 bits, in a track's header, by version.
_TRACK_SIZE = (76, 88)
_SAMPLE_ENTRY_BYTES = 78


class _Metadata(NamedTuple):
    """The places of EXIF and XMP in the file."""

    exif: Span | None = None
    xmp: Span | None = None


def accepts(data: bytes) -> bool:
    """Whether a file in this container is AVIF rather than HEIF."""
    if data[8:12] not in BRANDS:
        return False
    size = min(struct.unpack_from(">I", data)[0], _MAX_BRANDS_BYTES, len(data))
    return any(data[at : at + 4] in _BRANDS for at in range(8, size, 4))


def read(data: bytes) -> ImageHeader:
    """`animated` if the file calls itself a sequence.

    Raises:
        InvalidImage: there is no primary item or track, or it has no size.
    """
    if data[8:12] == b"avis":
        return _sequence(data)
    parts = children(data, child(data, whole(data), b"meta"), FULL)
    properties = primary_properties(data, parts)
    picture = spatial_extents(data, properties)
    if not _turn(data, picture, properties):
        _turn_by_text(picture, _metadata(data, parts, primary_item(data, parts)))
    return picture.header("AVIF", animated=False)


def _sequence(data: bytes) -> ImageHeader:
    track = child(data, child(data, whole(data), b"moov"), b"trak")
    parts = children(data, track)
    header = parts.get(b"tkhd")
    if header is None:
        raise missing(b"tkhd")
    at = header.start + _TRACK_SIZE[data[header.start] & 1]
    width, height = struct.unpack_from(">II", data, at)
    picture = Picture(width >> 16, height >> 16)
    turned = _turn(data, picture, _sample_properties(data, parts))
    if not turned and b"meta" in parts:
        _turn_by_text(picture, _metadata(data, children(data, parts[b"meta"], FULL)))
    return picture.header("AVIF", animated=True)


def _sample_properties(data: bytes, parts: dict[bytes, Box]) -> list[Box]:
    """The boxes in the first sample entry of a track."""
    box = parts.get(b"mdia")
    if box is None:
        raise missing(b"mdia")
    for kind in (b"minf", b"stbl", b"stsd"):
        box = child(data, box, kind)
    entry = child(data, box, b"av01", FULL + 4)
    return list(boxes(data, entry, _SAMPLE_ENTRY_BYTES))


def _turn(data: bytes, picture: Picture, properties: list[Box]) -> bool:
    """Apply the first property of each kind; returns whether the picture was turned or mirrored."""
    first: dict[bytes, Box] = {}
    for box in properties:
        first.setdefault(box.kind, box)
    if b"irot" in first:
        picture.turn(data, first[b"irot"])
    if b"imir" in first:
        picture.mirror(data, first[b"imir"])
    return picture.orientation != 1


def _turn_by_text(picture: Picture, text: _Metadata) -> None:
    if text.xmp is not None and (text.exif is None or not has_orientation(text.exif)):
        picture.orient(orientation(None, text.xmp))


# ---------------------------------------------------------------------- EXIF and XMP
# By items: ISO/IEC 14496-12, 8.11; ISO/IEC 23008-12, annex A.

_EXIF = b"Exif"
_MIME = b"mime"
_XMP_TYPE = b"application/rdf+xml\0"

_MAX_NAME = 256

# The first version of an item's entry with a type.
_TYPED = 2
# The base of an item's offset.
_IN_FILE, _IN_IDAT = 0, 1

# EXIF is preceded by the offset of its TIFF header, which decoders ignore.
_EXIF_OFFSET_BYTES = 4


def _metadata(data: bytes, parts: dict[bytes, Box], item: int | None = None) -> _Metadata:
    """EXIF and XMP that describe `item`, or any item if None; `parts` are the boxes in `meta`."""
    if b"iinf" not in parts or b"iloc" not in parts:
        return _Metadata()
    described = None
    if item is not None:
        described = _describing(data, parts[b"iref"], item) if b"iref" in parts else ()
    items = _metadata_items(data, parts[b"iinf"], described)
    if not items:
        return _Metadata()
    spans = _extents(data, parts, items.values())
    exif, xmp = (spans.get(items.get(kind, -1)) for kind in (_EXIF, _MIME))
    if exif is not None:
        exif = exif._replace(start=exif.start + _EXIF_OFFSET_BYTES)
    return _Metadata(exif, xmp)


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
    """The places of the `wanted` items that are in the file and in one piece."""
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
        fields.take(2)  # the item's file; decoders assume this one
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

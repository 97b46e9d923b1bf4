"""AVIF: the primary picture, or the first track of a sequence, as libavif and Pillow read it.

AV1 Image File Format 1.2. libavif does not crop, and turns before it mirrors. If the file asks for
neither, Pillow turns the picture by its XMP, unless its EXIF has an orientation, whatever it is.
"""

import struct

from server.imaging.header.base import Header
from server.imaging.header.boxes import FULL, Box, boxes, child, children, missing, whole
from server.imaging.header.exif import has_orientation, orientation
from server.imaging.header.items import primary_item, primary_properties
from server.imaging.header.metadata import Metadata, metadata
from server.imaging.header.picture import Picture, spatial_extents

_BRANDS = frozenset((b"avif", b"avis"))

# What a file's first brand must be one of.
BRANDS = _BRANDS | {b"mif1", b"msf1"}
_MAX_BRANDS_BYTES = 256

# Where width and height are in a track's header, by its version: 16.16 bits each.
_TRACK_SIZE = (76, 88)
_SAMPLE_ENTRY_BYTES = 78


def accepts(data: bytes) -> bool:
    """Whether the file is AVIF, not just of the container that HEIF shares."""
    if data[8:12] not in BRANDS:
        return False
    size = min(struct.unpack_from(">I", data)[0], _MAX_BRANDS_BYTES, len(data))
    return any(data[at : at + 4] in _BRANDS for at in range(8, size, 4))


def read(data: bytes) -> Header:
    """`animated` if the file calls itself a sequence.

    Raises:
        InvalidImage: no primary item or track, or none with a size.
    """
    if data[8:12] == b"avis":
        return _sequence(data)
    parts = children(data, child(data, whole(data), b"meta"), FULL)
    properties = primary_properties(data, parts)
    picture = spatial_extents(data, properties)
    if not _turn(data, picture, properties):
        _turn_by_text(picture, metadata(data, parts, primary_item(data, parts)))
    return picture.header("AVIF", animated=False)


def _sequence(data: bytes) -> Header:
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
        _turn_by_text(picture, metadata(data, children(data, parts[b"meta"], FULL)))
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
    """Whether the properties turn or mirror the picture, by the first of each kind."""
    first: dict[bytes, Box] = {}
    for box in properties:
        first.setdefault(box.kind, box)
    if b"irot" in first:
        picture.turn(data, first[b"irot"])
    if b"imir" in first:
        picture.mirror(data, first[b"imir"])
    return picture.orientation != 1


def _turn_by_text(picture: Picture, text: Metadata) -> None:
    if text.xmp is not None and (text.exif is None or not has_orientation(text.exif)):
        picture.orient(orientation(None, text.xmp))

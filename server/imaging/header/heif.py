"""HEIF (HEIC): the primary picture, cropped and turned as its properties say, in their order.

ISO/IEC 23008-12, 6.5. Orientations in EXIF and XMP only repeat the turns of the properties; libheif
does not look at them, and pillow-heif wipes them out.
"""

from server.imaging.header.base import Header
from server.imaging.header.boxes import FULL, child, children, whole
from server.imaging.header.items import primary_properties
from server.imaging.header.picture import spatial_extents

_SEQUENCES = frozenset((b"hevc", b"hevx", b"hevm", b"hevs", b"msf1"))

# What a file's first brand must be one of.
BRANDS = _SEQUENCES | {b"heic", b"heix", b"heim", b"heis", b"mif1"}


def read(data: bytes) -> Header:
    """`animated` if the file calls itself a sequence; a collection of pictures counts as one.

    Raises:
        InvalidImage: no primary item, or none with a size.
    """
    meta = child(data, whole(data), b"meta")
    properties = primary_properties(data, children(data, meta, FULL))
    picture = spatial_extents(data, properties)
    for box in properties:
        if box.kind == b"irot":
            picture.turn(data, box)
        elif box.kind == b"imir":
            picture.mirror(data, box)
        elif box.kind == b"clap":
            picture.crop(data, box)
    return picture.header("HEIF", animated=data[8:12] in _SEQUENCES)

"""HEIF (HEIC): the primary picture, cropped and turned by its properties, in their order.

ISO/IEC 23008-12, 6.5. Orientations in EXIF and XMP only repeat the turns of the properties; libheif
ignores them, and pillow-heif removes them.
"""

import struct

from server.imaging.header.base import SIDEWAYS, ImageHeader, damaged
from server.imaging.header.boxes import FULL, Box, child, children, primary_properties, whole

_SEQUENCES = frozenset((b"hevc", b"hevx", b"hevm", b"hevs", b"msf1"))

# The accepted values of a file's first brand.
BRANDS = _SEQUENCES | {b"heic", b"heix", b"heim", b"heis", b"mif1"}


def read(data: bytes) -> ImageHeader:
    """`animated` if the file calls itself a sequence; a collection of pictures counts as one.

    Raises:
        InvalidImage: there is no primary item, or it has no size.
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


# ---------------------------------------------------------------------- transformations

# EXIF orientations after a quarter turn to the left, and after a flip of top and bottom (axis 0) or
# left and right (axis 1), by the orientation before.
_TURNED_LEFT = (0, 8, 5, 6, 7, 4, 1, 2, 3)
_MIRRORED = ((0, 4, 3, 2, 1, 8, 7, 6, 5), (0, 2, 1, 4, 3, 6, 5, 8, 7))

# Width, height, and horizontal and vertical offset of the centre, each as numerator and
# denominator.
_APERTURE = struct.Struct(">IIIIiIiI")


class Picture:
    """The upright width and height in pixels of a picture while its properties are applied, and its
    orientation."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self.orientation = 1

    def turn(self, data: bytes, irot: Box) -> None:
        for _ in range(data[irot.start] & 3):
            self.width, self.height = self.height, self.width
            self.orientation = _TURNED_LEFT[self.orientation]

    def mirror(self, data: bytes, imir: Box) -> None:
        self.orientation = _MIRRORED[data[imir.start] & 1][self.orientation]

    def orient(self, orientation: int) -> None:
        """Set the orientation of a picture that was not turned yet."""
        self.orientation = orientation
        if orientation in SIDEWAYS:
            self.width, self.height = self.height, self.width

    def crop(self, data: bytes, clap: Box) -> None:
        """
        Raises:
            InvalidImage: a denominator is zero.
        """
        aperture = _APERTURE.unpack_from(data, clap.start)
        if not all(aperture[1::2]):
            raise damaged("HEIF", "a crop divides by zero")
        width, height, right, down = zip(aperture[::2], aperture[1::2], strict=True)
        self.width = _kept(self.width, width, right, rounds=False)
        self.height = _kept(self.height, height, down, rounds=True)

    def header(self, format_: str, animated: bool) -> ImageHeader:
        stored = (self.width, self.height)
        if self.orientation in SIDEWAYS:
            stored = (self.height, self.width)
        return ImageHeader(format_, *stored, self.orientation, animated)


def spatial_extents(data: bytes, properties: list[Box]) -> Picture:
    """The picture before any transformation.

    Raises:
        InvalidImage: it has no size, or several.
    """
    extents = [box for box in properties if box.kind == b"ispe"]
    if len(extents) != 1:
        raise damaged("HEIF or AVIF", f"its picture has {len(extents)} sizes instead of one")
    return Picture(*struct.unpack_from(">II", data, extents[0].start + FULL))


def _kept(side: int, kept: tuple[int, int], offset: tuple[int, int], rounds: bool) -> int:
    """The number of pixels of a side of `side` pixels after a crop to `kept` pixels whose centre is
    `offset` pixels off.

    `kept` and `offset` are (numerator, denominator). As in libheif, pixels outside the picture are
    dropped, the upper edge is rounded to the nearest pixel, and the left one towards zero.
    """
    n, d = kept
    offset_n, offset_d = offset
    # offset + (side - 1) / 2 - (kept - 1) / 2
    numerator = 2 * offset_n * d + (side - 1) * offset_d * d - (n - d) * offset_d
    denominator = 2 * offset_d * d
    first = _truncated(numerator + (denominator // 2 if rounds else 0), denominator)
    last = _truncated(n + (first - 1) * d + d // 2, d)
    return min(last, side - 1) - max(first, 0) + 1


def _truncated(numerator: int, denominator: int) -> int:
    quotient = abs(numerator) // denominator
    return quotient if numerator >= 0 else -quotient

"""The contents of a header, and what the readers of all formats share."""

import msgspec

from server.errors import InvalidImage

# Readers follow a list of segments, chunks, blocks, boxes or directory entries for at most this
# many steps. A step reads one length field and takes less than a microsecond.
MAX_STEPS = 1024

# XMP, and EXIF in hexadecimal, are searched and unpacked up to this many bytes.
MAX_TEXT_BYTES = 160 << 10

# EXIF orientations that swap width and height.
SIDEWAYS = range(5, 9)


class ImageHeader(msgspec.Struct, frozen=True):
    """The header of an encoded picture.

    `format` is one of `FORMATS`. `width` and `height` are in pixels, as stored but after HEIF's
    crops. `orientation` is EXIF's, 1 to 8, and 1 if it is missing or invalid; the decoders of TIFF
    and HEIF turn the picture themselves, and the caller does so for all other formats. `animated`
    means that there may be more frames or pages; the size is that of the first one.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    animated: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """The upright picture's (width, height) in pixels."""
        if self.orientation in SIDEWAYS:
            return self.height, self.width
        return self.width, self.height


def damaged(format_: str, what: str) -> InvalidImage:
    """The error for a damaged header."""
    return InvalidImage(f"the {format_} image is damaged: {what}")

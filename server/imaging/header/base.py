"""What a header says, and what the readers of all formats share."""

from dataclasses import dataclass

from server.errors import InvalidImage

# No reader takes more steps than this along one list of segments, chunks, blocks, boxes or entries
# of a directory. A step reads one length field and takes less than a microsecond.
MAX_STEPS = 1024

# XMP, and EXIF in hexadecimal, are searched and unpacked up to this many bytes.
MAX_TEXT_BYTES = 160 << 10

# EXIF orientations that swap width and height.
SIDEWAYS = range(5, 9)


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an encoded picture says.

    `format` is one of `FORMATS`. `width` and `height` are in pixels and as stored, but with HEIF's
    crops done. `orientation` is how a viewer turns them: EXIF's 1 to 8, with 1 also for a missing
    or invalid one. The decoders of TIFF and HEIF turn pictures themselves; for all other formats
    the caller does. `animated` says that there may be more frames or pages; the size is that of the
    first.
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
    return InvalidImage(f"the {format_} image is damaged: {what}")

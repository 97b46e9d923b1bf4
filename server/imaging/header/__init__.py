"""Format, size and orientation of an encoded picture, from its header alone.

Made for the event loop and for hostile bytes: pure Python on lengths and offsets; no pixel is
decoded, and nothing allocated by what a header claims. The result is what the decoders (Pillow,
and libheif for HEIF) make of the file after turning it upright. Where a header is so damaged that
they might differ, the picture is refused or, beyond the bounds, taken as it is stored.

The bounds: a reader follows at most a dozen lists of segments, chunks, blocks, boxes or entries,
each for at most `MAX_STEPS` length fields (in PNG there is one list, of 4096), and looks through at
most `MAX_TEXT_BYTES` of XMP or of EXIF in hexadecimal. Nothing is recursive.
"""

import struct
from collections.abc import Callable

from server.errors import InvalidImage, UnsupportedImageFormat
from server.imaging.header import avif, bmp, gif, heif, jpeg, png, tiff, webp
from server.imaging.header.base import Header

__all__ = ["FORMATS", "Header", "read"]

# What `Header.format` can be; they are also Pillow's names of the formats.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")

_MAGIC: tuple[tuple[bytes, Callable[[bytes], Header]], ...] = (
    (b"\xff\xd8\xff", jpeg.read),
    (b"\x89PNG\r\n\x1a\n", png.read),
    (b"GIF87a", gif.read),
    (b"GIF89a", gif.read),
    *((start, tiff.read) for start in tiff.MAGIC),
    (b"BM", bmp.read),
)


def read(data: bytes) -> Header:
    """The header of the encoded picture `data`; the magic bytes alone decide on the format.

    Raises:
        UnsupportedImageFormat: the data begins like none of the formats.
        InvalidImage: the header is truncated or damaged, or a side is zero.
    """
    if not data:
        raise InvalidImage("the image is empty")
    reader = _reader(data)
    try:
        header = reader(data)
    except (struct.error, IndexError):
        raise InvalidImage("the image is truncated: its header is not complete") from None
    if header.width <= 0 or header.height <= 0:
        raise InvalidImage(f"the image has {header.width}x{header.height} pixels")
    return header


def _reader(data: bytes) -> Callable[[bytes], Header]:
    for magic, reader in _MAGIC:
        if data.startswith(magic):
            return reader
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return webp.read
    if data[4:8] == b"ftyp" and avif.accepts(data):
        return avif.read
    if data[4:8] == b"ftyp" and data[8:12] in heif.BRANDS:
        return heif.read
    raise UnsupportedImageFormat(
        "the data is not an image in a supported format "
        "(JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC/HEIF)"
    )

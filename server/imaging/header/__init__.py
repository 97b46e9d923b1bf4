"""Format, size and orientation of an encoded picture, from its header alone.

It runs on the event loop and reads hostile bytes, so it is pure Python on lengths and offsets: it
decodes no pixels and never allocates memory by a length in the header. The result agrees with the
decoders (Pillow, and libheif for HEIF) after they turn the picture upright. If a header is so
damaged that they might differ, the picture is refused or, beyond the limits below, not turned.

Limits: a reader follows at most a dozen lists of segments, chunks, blocks, boxes or entries, each
for at most `MAX_STEPS` length fields (PNG has one list, of 4096), and searches at most
`MAX_TEXT_BYTES` of XMP or of EXIF in hexadecimal. Nothing is recursive.
"""

import struct
from collections.abc import Callable

from server.errors import InvalidImage, UnsupportedImageFormat
from server.imaging.header import avif, gif, heif, jpeg, png, tiff, webp
from server.imaging.header.base import ImageHeader, damaged

__all__ = ["FORMATS", "ImageHeader", "is_known", "read"]

# The values of `ImageHeader.format`, which are Pillow's names of the formats.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")

# BMP: the file header has 14 bytes, and the OS/2 1.x header behind it 12.
_BMP_FILE_HEADER, _BMP_OS2 = 14, 12
_BMP_WINDOWS = frozenset((40, 52, 56, 64, 108, 124))
# A negative height means that rows go from top to bottom; Pillow accepts it down to this value.
_BMP_MAX_TOP_DOWN = 1 << 24


def _read_bmp(data: bytes) -> ImageHeader:
    """The size, from an OS/2 1.x header or one of Windows and OS/2 2.x.

    Raises:
        InvalidImage: the header is truncated or has an unknown length.
    """
    (length,) = struct.unpack_from("<I", data, _BMP_FILE_HEADER)
    if len(data) < _BMP_FILE_HEADER + length:
        raise damaged("BMP", "it is truncated")
    if length == _BMP_OS2:
        width, height = struct.unpack_from("<HH", data, _BMP_FILE_HEADER + 4)
    elif length in _BMP_WINDOWS:
        width, height = struct.unpack_from("<ii", data, _BMP_FILE_HEADER + 4)
        if -_BMP_MAX_TOP_DOWN <= height < 0:
            height = -height
    else:
        raise damaged("BMP", f"its header has {length} bytes")
    return ImageHeader("BMP", width, height)


_MAGIC: tuple[tuple[bytes, Callable[[bytes], ImageHeader]], ...] = (
    (b"\xff\xd8\xff", jpeg.read),
    (b"\x89PNG\r\n\x1a\n", png.read),
    (b"GIF87a", gif.read),
    (b"GIF89a", gif.read),
    *((start, tiff.read) for start in tiff.MAGIC),
    (b"BM", _read_bmp),
)


def read(data: bytes) -> ImageHeader:
    """Read the header of the encoded picture `data`. Only the magic bytes decide the format.

    Raises:
        UnsupportedImageFormat: the data is in none of the formats.
        InvalidImage: the header is truncated or damaged, or a side is zero.
    """
    if not data:
        raise InvalidImage("the image is empty")
    reader = _reader(data)
    if reader is None:
        raise UnsupportedImageFormat(
            "the data is not an image in a supported format "
            "(JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC/HEIF)"
        )
    try:
        header = reader(data)
    except (struct.error, IndexError):
        raise InvalidImage("the image is truncated: its header is not complete") from None
    if header.width <= 0 or header.height <= 0:
        raise InvalidImage(f"the image has {header.width}x{header.height} pixels")
    return header


def is_known(data: bytes) -> bool:
    """Whether `data` is in one of the formats, by its magic bytes."""
    return _reader(data) is not None


def _reader(data: bytes) -> Callable[[bytes], ImageHeader] | None:
    for magic, reader in _MAGIC:
        if data.startswith(magic):
            return reader
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return webp.read
    if data[4:8] == b"ftyp" and avif.accepts(data):
        return avif.read
    if data[4:8] == b"ftyp" and data[8:12] in heif.BRANDS:
        return heif.read
    return None

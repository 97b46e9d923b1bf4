"""WebP: size of the frame or canvas, EXIF and XMP (RFC 9649, sections 2.3 to 2.7)."""

import struct

from server.imaging.header.base import MAX_STEPS, ImageHeader, damaged
from server.imaging.header.tiff import Span, orientation

_CHUNK = struct.Struct("<4sI")
_U32 = struct.Struct("<I")
_FIRST = 12  # the first chunk; RIFF's header is before it

_ANIMATED = 0x02
# The flags that announce metadata chunks; decoders ignore chunks without their flag.
_METADATA = {b"XMP ": 0x04, b"EXIF": 0x08}


def read(data: bytes) -> ImageHeader:
    """At most `MAX_STEPS` chunks are read; metadata behind more frames than that is ignored.

    Raises:
        InvalidImage: the file is truncated, or does not begin with a frame or canvas.
    """
    end = _FIRST - 4 + _U32.unpack_from(data, 4)[0]
    if end > len(data):
        raise damaged("WebP", "it is truncated")
    kind = data[_FIRST : _FIRST + 4]
    if kind == b"VP8X":
        return _extended(data, end)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = _U32.unpack_from(data, 21)
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    raise damaged("WebP", "it does not begin with a frame")


def _extended(data: bytes, end: int) -> ImageHeader:
    flags = data[20]
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    found: dict[bytes, Span] = {}
    at = _FIRST
    for _ in range(MAX_STEPS):
        if at + _CHUNK.size > end:
            break
        kind, length = _CHUNK.unpack_from(data, at)
        start = at + _CHUNK.size
        if start + length > end:
            raise damaged("WebP", "a chunk is cut short")
        if flags & _METADATA.get(kind, 0) and kind not in found:
            found[kind] = Span(data, start, start + length)
        at = start + length + (length & 1)
    turned = orientation(found.get(b"EXIF"), found.get(b"XMP "))
    return ImageHeader("WEBP", width, height, turned, animated=bool(flags & _ANIMATED))

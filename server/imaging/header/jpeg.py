"""JPEG: size, EXIF and XMP from the segments before the image data (ITU-T T.81, annex B)."""

import struct
from collections.abc import Iterator

from server.imaging.header.base import MAX_STEPS, ImageHeader, damaged
from server.imaging.header.tiff import Span, orientation

_LENGTH = struct.Struct(">H")
_SIZE = struct.Struct(">HH")

# The start of a frame header: precision, height, width, number of components.
_FRAME_BYTES = 6

_FIRST_MARKER = 0xC0
_SOS = 0xDA
_APP1 = 0xE1
# Frames that libjpeg decodes: Huffman or arithmetic, baseline, extended, progressive or lossless.
_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA))
# Hierarchical and differential frames, and lossless arithmetic coding.
_OTHER_FRAMES = frozenset((0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE))
# Markers without a length in Pillow's reader: RSTn, SOI, EOI, JPG and JPGn.
_ALONE = frozenset((0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))

_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"

# Some cameras pad between segments; decoders skip all bytes up to the next marker.
_MAX_JUNK_BYTES = 4096
# EXIF above 64 kB continues in further segments.
_MAX_EXIF_SEGMENTS = 8


def read(data: bytes) -> ImageHeader:
    """At most `MAX_STEPS` markers are read. Pictures within segments are ignored.

    Raises:
        InvalidImage: there is no frame header before the image data, or several, or one of an
            unsupported type.
    """
    sizes: list[tuple[int, int]] = []
    exif: list[tuple[int, int]] = []
    xmp = None
    for marker, start, end in _segments(data):
        if marker in _FRAMES and end - start >= _FRAME_BYTES:
            sizes.append(_SIZE.unpack_from(data, start + 1))
        elif marker in _OTHER_FRAMES:
            raise damaged("JPEG", f"frames of type 0x{marker:02x} are not supported")
        elif marker == _APP1 and data.startswith(_EXIF, start, end):
            exif.append((start, end))
        elif marker == _APP1 and data.startswith(_XMP, start, end):
            xmp = Span(data, start + len(_XMP), end)
    if len(sizes) != 1:
        raise damaged("JPEG", f"it has {len(sizes)} frame headers before the image data")
    height, width = sizes[0]
    return ImageHeader("JPEG", width, height, orientation(_whole_exif(data, exif), xmp))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The segments before the image data: marker, and start and end of the contents.

    Raises:
        InvalidImage: there are bytes outside of segments, or too many segments.
        IndexError: the data ends before the image data begins.
    """
    at = 2
    for _ in range(MAX_STEPS):
        if data[at] != 0xFF:
            at = data.find(b"\xff", at, at + _MAX_JUNK_BYTES)
            if at < 0:
                raise damaged("JPEG", "a marker is missing")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte before the marker
            at += 1
        elif marker == 0 or marker in _ALONE:
            at += 2
        elif marker == _SOS:
            return
        elif marker < _FIRST_MARKER:
            raise damaged("JPEG", f"an unknown marker 0x{marker:02x}")
        else:
            start = at + 4
            at += 2 + _LENGTH.unpack_from(data, at + 2)[0]
            yield marker, start, at
    raise damaged("JPEG", "too many segments")


def _whole_exif(data: bytes, segments: list[tuple[int, int]]) -> Span | None:
    if not segments:
        return None
    if len(segments) == 1:
        return Span(data, *segments[0])
    parts = (data[start + len(_EXIF) : end] for start, end in segments[:_MAX_EXIF_SEGMENTS])
    whole = b"".join(parts)
    return Span(whole, 0, len(whole))

"""PNG: size, EXIF and XMP from the chunks, some of which may follow the image data.

The W3C's PNG specification, third edition, sections 5 and 11. ImageMagick and exiftool write EXIF
as text in hexadecimal ("Raw profile type exif").
"""

import re
import struct
import zlib
from dataclasses import dataclass, field

from server.imaging.header.base import MAX_TEXT_BYTES, ImageHeader, damaged
from server.imaging.header.tiff import Span, orientation

_CHUNK = struct.Struct(">I4s")
_CHUNK_TYPE = re.compile(rb"\w{4}")
_SIZE = struct.Struct(">II")
_FIRST = 8  # the signature is before it
_IHDR_BYTES = 13

_MAX_CHUNKS = 4096
# Chunks of image data are consecutive, and most encoders make all but the last one equally long
# (libpng: 8 KiB). So this many are skipped at once if the chunk behind them has the same length.
_LEAP = 64

_EXIF = b"exif"
_PROFILE = b"Raw profile type exif"
_XMP = b"XML:com.adobe.xmp"
_KEYWORDS = frozenset((_EXIF, _PROFILE, _XMP))
_MAX_KEYWORD = 80


@dataclass
class _Found:
    """What the chunks say. `texts` has the last chunk of each keyword: (type, start behind the
    keyword, end). `frames` is the number of frames of an animation; the image data is the first of
    them if `framed`.
    """

    width: int
    height: int
    pixels: bool = False
    frames: int = 0
    framed: bool = False
    exif: Span | None = None
    texts: dict[bytes, tuple[bytes, int, int]] = field(default_factory=dict)

    @property
    def animated(self) -> bool:
        return self.frames > (1 if self.framed else 0)


def read(data: bytes) -> ImageHeader:
    """At most 4096 chunks are read; later ones are ignored, and so are checksums.

    Raises:
        InvalidImage: the first chunk is not the header, or there is no image data.
    """
    found = _walk(data)
    if not found.pixels:
        raise damaged("PNG", "it has no image data")
    exif, xmp = found.exif, None
    if exif is None and _PROFILE in found.texts:
        exif = _from_profile(_text(data, *found.texts[_PROFILE]))
    if _XMP in found.texts:
        text = _text(data, *found.texts[_XMP])
        xmp = Span(text, 0, len(text))
    turned = orientation(exif, xmp)
    return ImageHeader("PNG", found.width, found.height, turned, found.animated)


def _walk(data: bytes) -> _Found:
    length, kind = _CHUNK.unpack_from(data, _FIRST)
    if kind != b"IHDR" or length < _IHDR_BYTES:
        raise damaged("PNG", "it does not begin with its header")
    found = _Found(*_SIZE.unpack_from(data, _FIRST + _CHUNK.size))
    at = _FIRST + length + 12
    last = len(data) - _CHUNK.size
    for _ in range(_MAX_CHUNKS):
        if at > last:
            break
        length, kind = _CHUNK.unpack_from(data, at)
        if kind == b"IDAT":
            found.pixels = True
            leap = _LEAP * (length + 12)
            alike = data[at : at + 8] == data[at + leap : at + leap + 8]
            at += leap if alike else length + 12
            continue
        start = at + 8
        at = start + length + 4
        if kind == b"IEND" or not _see(data, kind, (start, start + length), found):
            break
    return found


def _see(data: bytes, kind: bytes, place: tuple[int, int], found: _Found) -> bool:
    """Record a chunk other than IDAT. Returns False behind the chunks of the first frame, or if the
    data is not a chunk."""
    start, end = place
    if kind == b"IHDR" and not found.pixels:
        raise damaged("PNG", "it has several headers")
    if kind == b"eXIf":
        found.exif = Span(data, start, end)
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
        _see_text(data, kind, place, found)
    elif kind == b"acTL" and not found.pixels:
        (frames,) = struct.unpack_from(">I", data, start)
        found.frames = frames if frames <= 1 << 31 else 0
    elif kind == b"fcTL":
        if found.pixels:
            return not found.animated
        found.framed = True
    elif kind == b"fdAT":
        found.pixels = True
    elif not _CHUNK_TYPE.fullmatch(kind):
        return False
    return True


def _see_text(data: bytes, kind: bytes, place: tuple[int, int], found: _Found) -> None:
    start, end = place
    key_end = data.find(b"\0", start, min(end, start + _MAX_KEYWORD))
    keyword = data[start:key_end] if key_end >= 0 else b""
    if keyword not in _KEYWORDS:
        return
    start = key_end + 1
    if keyword != _EXIF:
        found.texts[keyword] = (kind, start, end)
    elif kind == b"tEXt":
        found.exif = Span(data, start, end)


def _text(data: bytes, kind: bytes, start: int, end: int) -> bytes:
    """The text of a text chunk; empty if it is damaged.

    The text is truncated to `MAX_TEXT_BYTES`, both before and after unpacking.
    """
    compressed = kind == b"zTXt"
    if compressed:
        start += 1  # the compression method; there is only one
    elif kind == b"iTXt":
        compressed, method = data[start] != 0, data[start + 1]
        limit = min(end, start + MAX_TEXT_BYTES)
        language = data.find(b"\0", start + 2, limit)
        translated = data.find(b"\0", language + 1, limit) if language >= 0 else -1
        if translated < 0 or (compressed and method):
            return b""
        start = translated + 1
    text = data[start : min(end, start + MAX_TEXT_BYTES)]
    if not compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _from_profile(text: bytes) -> Span:
    """EXIF from a profile in hexadecimal, which begins with lines for its name and length."""
    lines = text.split(b"\n", 3)
    digits = lines[3].translate(None, b"\n") if len(lines) == 4 else b""
    if len(text) == MAX_TEXT_BYTES:  # truncated, perhaps within a byte
        digits = digits[: len(digits) & ~1]
    try:
        exif = bytes.fromhex(digits.decode("latin-1"))
    except ValueError:
        exif = b"damaged"
    return Span(exif, 0, len(exif))

"""PNG. Files that are interlaced or have 16 bits per sample, which are rare, are left to Pillow.

Inflating with libdeflate and undoing the filters in compiled loops takes 40% of Pillow's time. The
checksums of all critical chunks are checked.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from server.errors import InvalidImage
from server.imaging.codecs.base import (
    BY_MEANS,
    BYTES_PER_PIXEL,
    NO_REDUCTIONS,
    Indexed,
    Pixels,
    Stored,
    damaged,
    load_large,
    orientation,
    profile,
    truncated,
)
from server.imaging.codecs.pillow import PillowSource

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FRAME = struct.Struct(">I4s")
_HEADER = struct.Struct(">IIBBBBB")
_CRITICAL = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND"))
# Chunks of pixels and of animation, which Pillow does not get.
_LEFT_OUT = frozenset((b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"))

_UNPACKED = frozenset((b"iCCP", b"zTXt", b"iTXt"))
_MAX_PALETTE_BYTES = 3 * 256

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGBA: 4}
_PACKED = (1, 2, 4)  # bits per sample; a byte holds several samples

# Encoders split the image data into chunks of 8 KiB or more.
_MAX_CHUNKS = 200_000
# Some encoders append data to the rows; libpng and Pillow ignore it.
_SURPLUS_BYTES = 1 << 16
# About 100 MB in RGB. Larger pictures are streamed.
_MAX_WHOLE_PIXELS = 32_000_000


@dataclass
class _Chunks:
    """`data` has the (start, end) of each chunk of image data; `rest` are the chunks without pixels
    and animation."""

    header: tuple[int, ...]
    data: list[tuple[int, int]] = field(default_factory=list)
    rest: list[bytes] = field(default_factory=list)


class PngSource:
    """The still picture of a PNG file."""

    def __init__(self, data: bytes) -> None:
        chunks = _read(data)
        image = _opened(chunks.rest)
        self._data = data
        self._chunks = chunks
        self._image = image
        self.size = image.size
        self.orientation = orientation(image)
        self.profile = profile(image)
        width, height, bits, colour, packing, filtering, interlaced = chunks.header
        if packing or filtering or (colour == _PALETTE and not _has_palette(image)):
            raise damaged()
        transparent = "transparency" in image.info
        packed = bits in _PACKED and (colour == _PALETTE or (colour == _GREY and not transparent))
        self._plain = not interlaced and colour in _CHANNELS and (bits == 8 or packed)
        # libvips decodes these to the same pixels as the code below.
        streams = bits == 8 and colour in (_GREY, _RGB, _RGBA) and not transparent
        self._large = self._plain and streams and width * height > _MAX_WHOLE_PIXELS
        self.reductions = BY_MEANS if self._large else NO_REDUCTIONS
        self.bytes_per_pixel = BYTES_PER_PIXEL

    def load(self, factor: int) -> Stored:
        if not self._plain:
            return PillowSource(self._data, 0, "PNG").load(1)
        if self._large:
            return load_large("pngload", self._data, self.size, factor)
        bits, colour = self._chunks.header[2:4]
        rows = self._rows()
        if _CHANNELS[colour] == 1:
            numbers = rows.reshape(self.size[1], -1)
            if bits < 8:
                numbers = _unpacked(numbers, bits, self.size[0])
            return Indexed(numbers, _entries(self._image, bits))
        if colour == _GREY_ALPHA or "transparency" in self._image.info:
            return _as_image(rows, self._image)
        return rows

    def _rows(self) -> Pixels:
        """The unfiltered rows: uint8 (height, width, channels). If samples are packed, width is the
        number of bytes."""
        import deflate

        from server.imaging.codecs import kernels

        width, height, bits, colour, *_ = self._chunks.header
        channels = _CHANNELS[colour]
        row = -(-width * channels * bits // 8)
        view = memoryview(self._data)
        parts = (view[start:end] for start, end in self._chunks.data)
        try:
            raw = deflate.zlib_decompress(b"".join(parts), height * (row + 1) + _SURPLUS_BYTES)
        except deflate.DeflateError as error:
            raise damaged() from error
        if len(raw) < height * (row + 1):
            raise truncated()
        rows = np.frombuffer(raw, np.uint8, height * (row + 1)).reshape(height, row + 1)
        pixels = np.empty((height, row), np.uint8)
        if kernels.unfilter(rows, pixels, channels) >= 0:
            raise damaged()
        return pixels.reshape(height, -1, channels)


def open_png(data: bytes, frame: int) -> "PngSource | PillowSource":
    return PillowSource(data, frame, "PNG") if frame else PngSource(data)


def _read(data: bytes) -> _Chunks:
    """
    Raises:
        InvalidImage: the file is truncated, a checksum is wrong, or the header is missing.
    """
    chunks = _Chunks(())
    for kind, start, end in _walk(data):
        if (kind == b"IHDR") == bool(chunks.header):  # it must be first and unique
            raise damaged()
        if kind == b"IHDR":
            chunks.header = _HEADER.unpack_from(data, start)
        if kind == b"PLTE" and not 0 < end - start <= _MAX_PALETTE_BYTES:
            raise damaged()
        if kind == b"IDAT":
            chunks.data.append((start, end))
        elif kind not in _LEFT_OUT:
            chunks.rest.append(data[start - 8 : end + 4])
    if not chunks.data:
        raise damaged()
    # Pillow reads up to the image data, and fails if none begins.
    chunks.rest = [_SIGNATURE, *chunks.rest, _FRAME.pack(0, b"IDAT") + bytes(4)]
    return chunks


def _opened(chunks: list[bytes]) -> Image.Image:
    """Open `chunks` with Pillow for mode, palette, transparency, profile, EXIF and XMP."""
    try:
        return Image.open(io.BytesIO(b"".join(chunks)), formats=("PNG",))
    except ValueError:  # a profile or text decompresses to more than Pillow allows
        plain = [chunk for chunk in chunks if chunk[4:8] not in _UNPACKED]
        return Image.open(io.BytesIO(b"".join(plain)), formats=("PNG",))


def _walk(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the chunks up to IEND. Checks the checksums of critical chunks."""
    view = memoryview(data)
    at = len(_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(data):
            raise truncated()
        length, kind = _FRAME.unpack_from(data, at)
        start, end = at + 8, at + 8 + length
        if end + 4 > len(data):
            raise truncated()
        if kind in _CRITICAL and _checksum(view[at + 4 : end]) != data[end : end + 4]:
            raise InvalidImage("the image is damaged: a checksum is wrong")
        yield kind, start, end
        if kind == b"IEND":
            return
        at = end + 4
    raise InvalidImage(f"the image has more than {_MAX_CHUNKS} chunks")


def _checksum(chunk: memoryview) -> bytes:
    import deflate

    return deflate.crc32(chunk).to_bytes(4, "big")


def _unpacked(packed: Pixels, bits: int, width: int) -> Pixels:
    """One number per byte, the first one from the highest bits: uint8 (height, width)."""
    count = 8 // bits
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    numbers = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & ((1 << bits) - 1)
    # The numbers of a byte are viewed as one wider number, so one lookup unpacks all of them.
    together = numbers.view(f"u{count}").ravel()[packed]
    return together.view(np.uint8)[:, :width]


def _has_palette(image: Image.Image) -> bool:
    return image.palette is not None and len(image.palette.palette) % 3 == 0


def _entries(image: Image.Image, bits: int) -> Image.Image:
    """The colours of the 256 indices as a picture of 256x1 pixels. With fewer bits, only the first
    ones occur."""
    if image.mode != "P":
        greys = np.arange(256) % (1 << bits) * 255 // ((1 << bits) - 1)
        entries = Image.fromarray(greys.astype(np.uint8)[None])
    else:
        entries = Image.frombytes("P", (256, 1), bytes(range(256)))
        assert image.palette is not None
        entries.putpalette(image.palette.palette)
    entries.info = image.info
    return entries


def _as_image(pixels: Pixels, image: Image.Image) -> Image.Image:
    shown = Image.frombuffer(image.mode, pixels.shape[1::-1], pixels, "raw", image.mode, 0, 1)
    shown.info = image.info
    return shown

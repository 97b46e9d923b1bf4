"""WebP, chunk by chunk, with lossless pictures of one colour."""

import struct

from tests.corpus.writers import bits

EXIF, ALPHA, ANIMATION = 0x08, 0x10, 0x02
MAX_SIDE = 16383


def chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    """A file of `chunks`; `size` replaces the right size."""
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def vp8l(width: int, height: int, color: tuple[int, int, int]) -> bytes:
    """The chunk of a lossless picture of one colour. Each of its five codes has one symbol, which
    takes no bits, so that 30 bytes hold any number of pixels."""
    red, green, blue = color
    fields = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 1), (0, 3)]
    fields += [(0, 1), (0, 1), (0, 1)]  # no transform, no colour cache, one group of codes
    for symbol in (green, red, blue, 255, 0):
        fields += [(1, 1), (0, 1), (1, 1), (symbol, 8)]
    return chunk(b"VP8L", bits.lsb_first(fields))


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    """The chunk that declares the canvas and the features of the file."""
    return chunk(b"VP8X", struct.pack("<I", flags) + _u24(width - 1) + _u24(height - 1))


def anim() -> bytes:
    return chunk(b"ANIM", struct.pack("<IH", 0xFFFFFFFF, 0))


def anmf(size: tuple[int, int], image: bytes, at: tuple[int, int] = (0, 0)) -> bytes:
    """A frame of an animation; `at` is even."""
    place = _u24(at[0] // 2) + _u24(at[1] // 2) + _u24(size[0] - 1) + _u24(size[1] - 1)
    return chunk(b"ANMF", place + _u24(10) + b"\0" + image)


def _u24(number: int) -> bytes:
    return struct.pack("<I", number)[:3]

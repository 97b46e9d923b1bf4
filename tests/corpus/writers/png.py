"""PNG, chunk by chunk."""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_ADLER = 65521


def chunk(kind: bytes, data: bytes = b"", crc: int | None = None) -> bytes:
    """One chunk; `crc` replaces the right checksum."""
    right = zlib.crc32(kind + data)
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", right if crc is None else crc)
    )


def ihdr(
    width: int,
    height: int,
    depth: int = 8,
    color: int = RGB,
    *,
    interlace: int = 0,
    method: int = 0,
) -> bytes:
    """The header chunk; `method` is the compression method."""
    fields = (width, height, depth, color, method, 0, interlace)
    return chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))


def scanlines(pixels: np.ndarray, filter_type: int = 0) -> bytes:
    """Rows of packed bytes, (height, bytes of a row) uint8, each with its filter type."""
    marks = np.full((len(pixels), 1), filter_type, np.uint8)
    return np.hstack([marks, pixels.reshape(len(pixels), -1)]).tobytes()


def idat(pixels: np.ndarray) -> bytes:
    return chunk(b"IDAT", zlib.compress(scanlines(pixels)))


def png(*chunks: bytes) -> bytes:
    """Signature, `chunks`, end."""
    return SIGNATURE + b"".join(chunks) + chunk(b"IEND")


def packed(samples: np.ndarray, depth: int) -> np.ndarray:
    """Samples of 1, 2, 4, 8 or 16 bits, (height, n), as rows of bytes."""
    if depth == 16:
        return samples.astype(">u2").view(np.uint8).reshape(len(samples), -1)
    bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return np.packbits(bits.reshape(len(samples), -1), axis=1)


def zlib_repeated(unit: bytes, times: int) -> bytes:
    """The zlib stream of `unit * times`, without holding these bytes in memory."""
    compressor = zlib.compressobj(9)
    once = compressor.compress(unit) + compressor.flush(zlib.Z_FULL_FLUSH)
    total, weighted = _sums(unit)
    low, high = 1, 0
    for _ in range(times):
        high = (high + len(unit) * low + weighted) % _ADLER
        low = (low + total) % _ADLER
    end_of_stream = b"\x03\x00" + struct.pack(">HH", high, low)
    return once[:2] + once[2:] * times + end_of_stream


def _sums(unit: bytes) -> tuple[int, int]:
    """The amounts that `unit` adds to the two halves of an Adler-32."""
    checksum = zlib.adler32(unit)
    return (checksum & 0xFFFF) - 1, ((checksum >> 16) - len(unit)) % _ADLER


def one_color(width: int, height: int, pixel: bytes, color: int = RGB, depth: int = 8) -> bytes:
    """A picture of one colour and any size; `pixel` are the bytes of a pixel (of 8, if less
    than 8 bits deep)."""
    row = b"\0" + pixel * (-(-width * depth // 8) if depth < 8 else width)
    rows = 50 if height % 50 == 0 else 1
    data = zlib_repeated(row * rows, height // rows)
    return png(ihdr(width, height, depth, color), chunk(b"IDAT", data))

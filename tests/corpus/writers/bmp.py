"""BMP, field by field."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RGB, RLE8, RLE4, BITFIELDS, JPEG = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Dib:
    """The fields of a BITMAPINFOHEADER; `length` is its declared length."""

    width: int
    height: int
    depth: int
    compression: int = RGB
    colors: int = 0
    planes: int = 1
    length: int = 40

    def packed(self) -> bytes:
        head = struct.pack("<IiiHH", self.length, self.width, self.height, self.planes, self.depth)
        return head + struct.pack("<IIiiII", self.compression, 0, 2835, 2835, self.colors, 0)


def bmp(header: bytes, palette: bytes, pixels: bytes, offset: int | None = None) -> bytes:
    """A file; `offset` replaces the right offset of the pixels."""
    at = 14 + len(header) + len(palette)
    size = at + len(pixels)
    start = at if offset is None else offset
    return b"BM" + struct.pack("<IHHI", size, 0, 0, start) + header + palette + pixels


def rows(packed: np.ndarray) -> bytes:
    """Rows of bytes, top first, as a bottom-up picture stores them: each padded to 4."""
    padding = -packed.shape[1] % 4
    return np.pad(packed, ((0, 0), (0, padding)))[::-1].tobytes()


def palette(colors: Sequence[tuple[int, int, int]], spare: bytes = b"\0") -> bytes:
    """Colours as blue, green, red and `spare`."""
    return b"".join(bytes(color[::-1]) + spare for color in colors)


def rle8(indices: np.ndarray) -> bytes:
    """8-bit run-length code of rows of indices, top first."""
    lines = [b"".join(_runs(row)) + b"\0\0" for row in indices[::-1]]
    return b"".join(lines) + b"\0\1"


def _runs(row: np.ndarray) -> list[bytes]:
    ends = [*(np.flatnonzero(np.diff(row)) + 1), len(row)]
    starts = [0, *ends[:-1]]
    return [bytes([end - start, row[start]]) for start, end in zip(starts, ends, strict=True)]

"""GIF, block by block."""

import struct
from collections.abc import Sequence

from tests.corpus.writers import bits

TRAILER = b"\x3b"


def screen(width: int, height: int, palette: bytes = b"", version: bytes = b"89a") -> bytes:
    """Header and logical screen; `palette` has 2, 4, 8, ... colours of 3 bytes."""
    flags = _table_flags(palette)
    return b"GIF" + version + struct.pack("<HHBBB", width, height, flags, 0, 0) + palette


def _table_flags(palette: bytes) -> int:
    return 0x80 | 0x70 | (len(palette) // 3).bit_length() - 2 if palette else 0


def frame(
    size: tuple[int, int], lzw: bytes, at: tuple[int, int] = (0, 0), *, interlaced: bool = False
) -> bytes:
    """An image descriptor and its data; `lzw` starts with the code size."""
    descriptor = b"\x2c" + struct.pack("<HHHHB", *at, *size, 0x40 if interlaced else 0)
    return descriptor + lzw[:1] + blocks(lzw[1:])


def blocks(data: bytes) -> bytes:
    """`data` in sub-blocks, with the empty block at the end."""
    cut = (data[at : at + 255] for at in range(0, len(data), 255))
    return b"".join(bytes([len(piece)]) + piece for piece in cut) + b"\0"


def control(delay: int = 0, transparent: int | None = None) -> bytes:
    """A graphic control extension; `delay` in hundredths of a second."""
    flags = 0 if transparent is None else 1
    return b"\x21\xf9\x04" + struct.pack("<BHBB", flags, delay, transparent or 0, 0)


def loop(times: int = 0) -> bytes:
    """The Netscape extension; 0 loops for ever."""
    return b"\x21\xff\x0bNETSCAPE2.0" + b"\x03\x01" + struct.pack("<H", times) + b"\0"


def uncompressed(pixels: Sequence[int], code_size: int = 2) -> bytes:
    """LZW data that never uses its dictionary, which is cleared before codes get longer."""
    clear, width = 1 << code_size, code_size + 1
    fields = []
    for number, pixel in enumerate(pixels):
        if number % (clear - 2) == 0:
            fields.append((clear, width))
        fields.append((int(pixel), width))
    return bytes([code_size]) + bits.lsb_first([*fields, (clear + 1, width)])


def one_color(pixels: int) -> bytes:
    """LZW data of at least `pixels` pixels of colour 0: 8.4 million for 6 KB."""
    fields, written = [], 0
    while written < pixels:
        fields.append((4, 3))
        width, run = 3, 1
        for code in [0, *range(6, 4096)]:
            fields.append((code, width))
            written += run
            run += 1
            if code + 1 == 1 << width and width < 12:
                width += 1
            if written >= pixels:
                break
    return b"\x02" + bits.lsb_first([*fields, (5, width)])

"""BMP: every header, depth and compression, and false fields."""

import functools
import struct
from collections.abc import Callable, Iterator

import numpy as np

from tests.corpus.cases import (
    ACCEPTED,
    INVALID,
    INVALID_OR_TOO_LARGE,
    INVALID_OR_UNSUPPORTED,
    SURVIVES,
    Case,
    Expectation,
    seen,
)
from tests.corpus.scenes import CORNERS, SIZE, indices, quadrants, upright
from tests.corpus.writers import bmp, png
from tests.corpus.writers.bmp import Dib

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_RIGHT = upright(2)
_COLORS = bmp.palette(CORNERS)


def cases() -> Iterator[Case]:
    for group in (_depths(), _headers(), _runs(), _lies()):
        for name, make, expected in group:
            yield Case(f"bmp/{name}", make, expected, "image/bmp")


def _bgr() -> np.ndarray:
    return np.ascontiguousarray(np.asarray(quadrants())[..., ::-1])


def _rows_24() -> bytes:
    return bmp.rows(_bgr().reshape(SIZE[1], -1))


def _plain(header: bytes = Dib(*SIZE, 24).packed(), offset: int | None = None) -> bytes:
    return bmp.bmp(header, b"", _rows_24(), offset)


def _depths() -> Group:
    two = seen((CORNERS[0], CORNERS[1]) * 2, SIZE, 2)
    yield "1-bit", lambda: _indexed(1, indices() % 2), two
    yield "4-bit", lambda: _indexed(4, indices()), _RIGHT
    yield "8-bit", lambda: _indexed(8, indices()), _RIGHT
    yield "16-bit-5-5-5", _rgb555, upright(10)
    yield "16-bit-5-6-5", _rgb565, upright(10)
    yield "24-bit", _plain, _RIGHT
    yield "32-bit", _rgb32, _RIGHT
    yield "24-bit-of-odd-width", _odd_width, seen(CORNERS, (90, 64), 2)


def _indexed(depth: int, pixels: np.ndarray) -> bytes:
    rows = bmp.rows(png.packed(pixels, depth))
    return bmp.bmp(Dib(*SIZE, depth, colors=4 if depth > 1 else 2).packed(), _palette(depth), rows)


def _palette(depth: int) -> bytes:
    return _COLORS if depth > 1 else _COLORS[:8]


def _words(widths: tuple[int, int, int]) -> bytes:
    """Pixels of 16 bits: red, green and blue with the given numbers of bits."""
    red, green, blue = (np.asarray(quadrants())[..., n].astype(np.uint16) for n in range(3))
    r, g, b = widths
    words = (red >> 8 - r) << g + b | (green >> 8 - g) << b | blue >> 8 - b
    return bmp.rows(words.astype("<u2").view(np.uint8))


def _rgb555() -> bytes:
    return bmp.bmp(Dib(*SIZE, 16).packed(), b"", _words((5, 5, 5)))


def _rgb565(masks: tuple[int, int, int] = (0xF800, 0x07E0, 0x001F)) -> bytes:
    header = Dib(*SIZE, 16, bmp.BITFIELDS).packed()
    return bmp.bmp(header, struct.pack("<III", *masks), _words((5, 6, 5)))


def _rgb32() -> bytes:
    pixels = np.dstack([_bgr(), np.zeros(SIZE[::-1], np.uint8)])
    return bmp.bmp(Dib(*SIZE, 32).packed(), b"", bmp.rows(pixels.reshape(SIZE[1], -1)))


def _odd_width() -> bytes:
    pixels = np.ascontiguousarray(np.asarray(quadrants((90, 64)))[..., ::-1])
    return bmp.bmp(Dib(90, 64, 24).packed(), b"", bmp.rows(pixels.reshape(64, -1)))


def _headers() -> Group:
    core = struct.pack("<IHHHH", 12, *SIZE, 1, 24)
    core_palette = b"".join(bytes(color[::-1]) for color in CORNERS) + bytes(3 * 252)
    yield "os2", lambda: bmp.bmp(core, b"", _rows_24()), _RIGHT
    yield "os2-palette", lambda: bmp.bmp(
        struct.pack("<IHHHH", 12, *SIZE, 1, 8), core_palette, bmp.rows(indices())
    ), _RIGHT  # fmt: skip
    yield "os2-version-2", lambda: _plain(Dib(*SIZE, 24, length=64).packed() + bytes(24)), _RIGHT
    yield "version-4", lambda: _plain(Dib(*SIZE, 24, length=108).packed() + bytes(68)), _RIGHT
    yield "version-5", lambda: _plain(Dib(*SIZE, 24, length=124).packed() + bytes(84)), _RIGHT
    yield "top-down", _top_down, _RIGHT
    for length in (0, 11, 41, 1 << 20, 0xFFFFFFFF):
        header = Dib(*SIZE, 24, length=length).packed()
        yield f"header-of-{length}", functools.partial(_plain, header), INVALID_OR_UNSUPPORTED
    yield "array-of-pictures", lambda: b"BA" + bytes(12) + _plain(), INVALID_OR_UNSUPPORTED


def _top_down() -> bytes:
    header = Dib(SIZE[0], -SIZE[1], 24).packed()
    return bmp.bmp(header, b"", _bgr().tobytes())


def _runs() -> Group:
    rle8 = Dib(*SIZE, 8, bmp.RLE8, 4).packed()
    rle4 = Dib(*SIZE, 4, bmp.RLE4, 4).packed()
    yield "rle8", lambda: bmp.bmp(rle8, _COLORS, bmp.rle8(indices())), _RIGHT
    yield "rle4", lambda: bmp.bmp(rle4, _COLORS, _rle4()), _RIGHT
    yield (
        "rle8-skips-beyond-the-end",
        lambda: bmp.bmp(rle8, _COLORS, b"\0\2\xff\xff" * 5000),
        SURVIVES,
    )
    yield "rle8-runs-beyond-the-row", lambda: bmp.bmp(rle8, _COLORS, b"\xff\1" * 5000), SURVIVES
    yield "rle8-ends-at-once", lambda: bmp.bmp(
        Dib(8000, 8000, 8, bmp.RLE8, 4).packed(), _COLORS, b"\0\1"
    ), SURVIVES  # fmt: skip
    yield "rle8-cut-in-a-literal", lambda: bmp.bmp(rle8, _COLORS, b"\0\xff\1"), INVALID
    yield "rle8-of-24-bits", lambda: _plain(Dib(*SIZE, 24, bmp.RLE8).packed()), SURVIVES


def _rle4() -> bytes:
    """Each row as two runs; both halves of a byte are the colour index of the run."""
    half = SIZE[0] // 2
    lines = (
        bytes([half, row[0] * 17, half, row[-1] * 17, 0, 0]) for row in indices()[::-1].tolist()
    )
    return b"".join(lines) + b"\0\1"


def _lies() -> Group:
    def said(**fields: int) -> Callable[[], bytes]:
        header = {"width": 96, "height": 64, "depth": 24, **fields}
        return lambda: _plain(Dib(**header).packed())

    yield "width-negative", said(width=-96), INVALID_OR_TOO_LARGE
    yield "width-0", said(width=0), INVALID
    yield "height-0", said(height=0), INVALID
    yield "height-least", said(height=-(1 << 31)), INVALID_OR_TOO_LARGE
    yield "depth-0", said(depth=0), INVALID_OR_UNSUPPORTED
    yield "depth-3", said(depth=3), INVALID_OR_UNSUPPORTED
    yield "depth-64", said(depth=64), INVALID_OR_UNSUPPORTED
    yield "planes-0", said(planes=0), SURVIVES
    yield "planes-7", said(planes=7), SURVIVES
    yield "compression-jpeg", said(compression=bmp.JPEG), INVALID_OR_UNSUPPORTED
    yield "compression-99", said(compression=99), INVALID_OR_UNSUPPORTED
    yield "palette-of-4-billion", lambda: bmp.bmp(
        Dib(*SIZE, 8, colors=0xFFFFFFFF).packed(), _COLORS, bmp.rows(indices())
    ), SURVIVES  # fmt: skip
    yield (
        "palette-missing",
        lambda: bmp.bmp(Dib(*SIZE, 8).packed(), b"", bmp.rows(indices())),
        SURVIVES,
    )
    yield "index-beyond-the-palette", lambda: bmp.bmp(
        Dib(*SIZE, 8, colors=4).packed(), _COLORS, bmp.rows(indices() + 200)
    ), SURVIVES  # fmt: skip
    yield "pixels-beyond-the-end", lambda: _plain(offset=1 << 24), INVALID
    yield "pixels-inside-the-header", lambda: _plain(offset=4), SURVIVES
    yield "masks-of-0", lambda: _rgb565((0, 0, 0)), SURVIVES
    yield "masks-overlapping", lambda: _rgb565((0xFFFF, 0xFFFF, 0xFFFF)), SURVIVES
    yield "trailing-bytes", lambda: _plain() + bytes(5000), ACCEPTED
    yield (
        "text",
        lambda: b"BMW is a maker of cars, and this is no bitmap at all.",
        INVALID_OR_UNSUPPORTED,
    )
    yield "magic-only", lambda: b"BM", INVALID_OR_UNSUPPORTED

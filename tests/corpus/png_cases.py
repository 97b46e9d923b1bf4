"""PNG: every pixel format, and broken chunks."""

import functools
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests.corpus.cases import (
    ACCEPTED,
    INVALID,
    INVALID_OR_TOO_LARGE,
    SURVIVES,
    Case,
    Expectation,
    named,
    seen,
    solid,
)
from tests.corpus.scenes import (
    CORNERS,
    PALETTE,
    SIZE,
    WHITE,
    circle,
    indices,
    paletted,
    quadrants,
    upright,
)
from tests.corpus.writers import png
from tests.corpus.writers.png import chunk, ihdr
from tests.pictures import encode

_GREYS = ((0,) * 3, (85,) * 3, (170,) * 3, (255,) * 3)
_IHDR = ihdr(*SIZE)
_MEGABYTE = 1 << 20


def _rgb() -> np.ndarray:
    return np.asarray(quadrants())


def _idat() -> bytes:
    return png.idat(_rgb())


def _with(*chunks: bytes) -> Callable[[], bytes]:
    """The quadrants with `chunks` between the header and the pixels."""
    return lambda: png.png(_IHDR, *chunks, _idat())


def cases() -> Iterator[Case]:
    for group in (_pixels(), _chunks(), _animated(), _headers(), _streams(), _bombs()):
        yield from (Case(f"png/{name}", make, expected) for name, make, expected in group)


Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]


def _pixels() -> Group:
    for depth in (1, 2, 4, 8, 16):
        greys = ((0,) * 3, (255,) * 3) * 2 if depth == 1 else _GREYS
        yield f"grey-{depth}-bit", functools.partial(_grey, depth), seen(greys, SIZE, 4)
    for depth in (2, 4, 8):
        yield f"palette-{depth}-bit", functools.partial(_palette, depth), upright(2)
    yield "rgb-16-bit", functools.partial(_deep, circle()), named("a red circle")
    yield "rgb-16-bit-quadrants", functools.partial(_deep, quadrants()), upright(2)
    yield "palette-circle", lambda: encode(circle().quantize(16)), named("a red circle")
    yield "interlaced", _interlaced, upright(2)
    yield "grey-with-a-transparent-level", lambda: _keyed(png.GREY), ACCEPTED
    yield "rgb-with-a-transparent-color", lambda: _keyed(png.RGB), seen((WHITE, *CORNERS[1:]), SIZE)
    yield "palette-with-transparency", _transparent_palette, seen((WHITE, *CORNERS[1:]), SIZE)
    yield "transparency-longer-than-the-palette", lambda: _transparent_palette(300), SURVIVES
    yield "transparency-of-rgba", lambda: png.png(
        ihdr(*SIZE, color=png.RGBA), chunk(b"tRNS", bytes(6)), png.idat(_rgba(255))
    ), SURVIVES  # fmt: skip
    yield "rgba-opaque", lambda: _rgba_file(255), upright(2)
    yield "rgba-fully-transparent", lambda: _rgba_file(0), solid(WHITE, SIZE, 2)
    yield "grey-and-alpha", lambda: encode(Image.new("LA", SIZE, (90, 255))), solid((90,) * 3, SIZE)
    yield "every-filter", _filtered, upright(2)


def _grey(depth: int) -> bytes:
    most = (1 << depth) - 1
    levels = (
        indices().astype(np.uint32) % 2 * most if depth == 1 else indices() * np.uint32(most) // 3
    )
    return png.png(ihdr(*SIZE, depth, png.GREY), png.idat(png.packed(levels, depth)))


def _palette(depth: int) -> bytes:
    pixels = png.packed(indices(), depth)
    return png.png(ihdr(*SIZE, depth, png.PALETTE), chunk(b"PLTE", PALETTE), png.idat(pixels))


def _deep(image: Image.Image) -> bytes:
    samples = np.asarray(image).astype(np.uint16) * 257
    pixels = png.packed(samples.reshape(image.height, -1), 16)
    return png.png(ihdr(*image.size, 16, png.RGB), png.idat(pixels))


def _interlaced() -> bytes:
    """Adam7: seven passes, each encoded like a picture."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)]  # fmt: skip
    lines = b"".join(png.scanlines(_rgb()[y::dy, x::dx]) for x, y, dx, dy in passes)
    return png.png(ihdr(*SIZE, interlace=1), chunk(b"IDAT", zlib.compress(lines)))


def _keyed(color: int) -> bytes:
    if color == png.GREY:
        return png.png(ihdr(*SIZE, color=color), chunk(b"tRNS", b"\0\1"), png.idat(indices()))
    key = struct.pack(">HHH", *CORNERS[0])
    return png.png(_IHDR, chunk(b"tRNS", key), _idat())


def _transparent_palette(entries: int = 1) -> bytes:
    head = ihdr(*SIZE, color=png.PALETTE) + chunk(b"PLTE", PALETTE)
    return png.png(head, chunk(b"tRNS", bytes(entries)), png.idat(indices()))


def _rgba(alpha: int) -> np.ndarray:
    return np.dstack([_rgb(), np.full(SIZE[::-1], alpha, np.uint8)])


def _rgba_file(alpha: int) -> bytes:
    return png.png(ihdr(*SIZE, color=png.RGBA), png.idat(_rgba(alpha)))


def _filtered() -> bytes:
    """Rows of the filter types 0, 1 and 2 in turn, filtered by definition."""
    rows, above, lines = _rgb().reshape(SIZE[1], -1), np.zeros(3 * SIZE[0], np.uint8), b""
    for number, row in enumerate(rows):
        left = np.concatenate([np.zeros(3, np.uint8), row[:-3]])
        filtered = (row, row - left, row - above)[number % 3]
        lines += bytes([number % 3]) + filtered.tobytes()
        above = row
    return png.png(_IHDR, chunk(b"IDAT", zlib.compress(lines)))


def _chunks() -> Group:
    right = upright(2)
    end = chunk(b"IEND")
    yield "trailing-php", lambda: encode(quadrants()) + b"<?php system($_GET[0]); ?>", right
    yield "missing-end", lambda: encode(quadrants())[: -len(end)], SURVIVES
    yield "second-header", lambda: png.png(_IHDR, _IHDR, _idat()), INVALID
    yield "second-header-larger", _with(ihdr(20_000, 20_000)), INVALID_OR_TOO_LARGE
    yield "header-not-first", lambda: png.png(chunk(b"gAMA", bytes(4)), _IHDR, _idat()), INVALID
    yield "header-behind-pixels", lambda: png.png(_idat(), _IHDR), INVALID
    yield "no-header", lambda: png.png(_idat()), INVALID
    yield "no-pixels", lambda: png.png(_IHDR), INVALID
    yield "empty-pixels", lambda: png.png(_IHDR, chunk(b"IDAT")), INVALID
    yield "no-palette", _without_palette, INVALID
    yield "empty-palette", lambda: _without_palette(chunk(b"PLTE")), INVALID
    yield "palette-not-of-triples", lambda: _without_palette(chunk(b"PLTE", bytes(10))), INVALID
    yield "palette-too-short", lambda: _without_palette(chunk(b"PLTE", bytes(6))), SURVIVES
    for number, expected in ((300, right), (20_000, SURVIVES)):
        yield f"unknown-chunks-{number}", _with(chunk(b"abCd", b"x") * number), expected
        yield f"text-chunks-{number}", _with(chunk(b"tEXt", b"a\0") * number), expected
    yield "unknown-critical-chunk", _with(chunk(b"ABCD", b"x")), SURVIVES
    yield "chunk-name-of-zeros", _with(chunk(bytes(4), b"x")), SURVIVES
    yield "chunk-of-4-gb", _with(struct.pack(">I", 0xFFFFFFFF) + b"tEXt"), INVALID
    yield "chunk-of-2-gb", _with(struct.pack(">I", 0x7FFFFFFF) + b"abCd"), INVALID
    yield (
        "pixels-of-4-gb",
        lambda: png.SIGNATURE + _IHDR + b"\xff\xff\xff\xffIDAT" + _idat(),
        INVALID,
    )
    yield "crc-of-header-wrong", lambda: png.png(_wrong_crc(_IHDR), _idat()), INVALID
    yield "crc-of-pixels-wrong", lambda: png.png(_IHDR, _wrong_crc(_idat())), INVALID
    yield "crc-of-text-wrong", _with(chunk(b"tEXt", b"a\0b", crc=1)), SURVIVES
    yield "pixels-in-thousands-of-chunks", _split_into_bytes, right
    yield "empty-pixel-chunks-5000", _with(chunk(b"IDAT") * 5000), SURVIVES


def _wrong_crc(good: bytes) -> bytes:
    return good[:-4] + bytes(byte ^ 0x55 for byte in good[-4:])


def _without_palette(palette: bytes = b"") -> bytes:
    return png.png(ihdr(*SIZE, color=png.PALETTE), palette, png.idat(indices()))


def _split_into_bytes() -> bytes:
    noisy = zlib.compress(png.scanlines(_rgb()), 0)
    return png.png(_IHDR, *(chunk(b"IDAT", noisy[at : at + 1]) for at in range(len(noisy))))


def _animated() -> Group:
    frames = [quadrants(), paletted().convert("RGB").rotate(180)]
    yield "animated", lambda: encode(frames[0], save_all=True, append_images=frames[1:]), upright(2)
    for frames_said in (0, 1, 1000, 0xFFFFFFFF):
        actl = chunk(b"acTL", struct.pack(">II", frames_said, 0))
        expected = SURVIVES if frames_said > 2**31 else upright(2)
        yield f"animated-says-{frames_said}-frames", _with(actl, _fctl(SIZE)), expected
    huge = chunk(b"acTL", struct.pack(">II", 2, 0)) + _fctl((30_000, 30_000))
    yield "animated-frame-larger", _with(huge), SURVIVES


def _fctl(size: tuple[int, int]) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, *size, 0, 0, 1, 10, 0, 0))


def _headers() -> Group:
    bad = {
        "width-0": ihdr(0, 64),
        "height-0": ihdr(96, 0),
        "depth-3": ihdr(*SIZE, depth=3),
        "depth-of-color": ihdr(*SIZE, depth=4, color=png.RGB),
        "color-5": ihdr(*SIZE, color=5),
        "compression-1": ihdr(*SIZE, method=1),
        "interlace-7": ihdr(*SIZE, interlace=7),
        "header-short": chunk(b"IHDR", struct.pack(">II", *SIZE)),
    }
    for name, head in bad.items():
        yield name, functools.partial(_with_header, head), INVALID
    yield "width-over-31-bits", lambda: _with_header(ihdr(2**31 + 5, 64)), INVALID_OR_TOO_LARGE


def _with_header(head: bytes) -> bytes:
    return png.png(head, _idat())


def _streams() -> Group:
    lines = png.scanlines(_rgb())
    good = zlib.compress(lines)
    bad = {
        "filter-9": zlib.compress(png.scanlines(_rgb(), 9)),
        "not-zlib": b"\x12\x34" + good[2:],
        "preset-dictionary": b"\x78\xbb" + bytes(4) + good[2:],
        "half-of-the-rows": zlib.compress(lines[: len(lines) // 2]),
        "block-type-3": b"\x78\x9c\x07" + bytes(20),
    }
    for name, data in bad.items():
        yield name, functools.partial(_with_stream, data), INVALID
    yield "adler-wrong", lambda: _with_stream(good[:-4] + bytes(4)), SURVIVES
    yield "more-rows-than-said", lambda: _with_stream(zlib.compress(lines * 2)), SURVIVES


def _with_stream(data: bytes) -> bytes:
    return png.png(_IHDR, chunk(b"IDAT", data))


def _bombs() -> Group:
    """A gigabyte of text or profile, compressed to a megabyte."""

    def text(head: bytes) -> Callable[[], bytes]:
        return lambda: png.png(
            _IHDR, chunk(head[:4], head[4:] + png.zlib_repeated(bytes(_MEGABYTE), 1024)), _idat()
        )

    yield "text-bomb", text(b"zTXtComment\0\0"), SURVIVES
    yield "international-text-bomb", text(b"iTXtComment\0\1\0\0\0"), SURVIVES
    yield "profile-bomb", text(b"iCCPicc\0\0"), SURVIVES
    small = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000)))
    yield "text-bombs-200", _with(small * 200), SURVIVES

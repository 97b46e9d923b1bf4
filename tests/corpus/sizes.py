"""Every format on both sides of each limit: tiny, thin, huge, and with false sizes."""

import functools
import struct
from collections.abc import Callable, Iterator

from PIL import Image

from tests.corpus.cases import (
    ACCEPTED,
    INVALID,
    SURVIVES,
    TOO_LARGE,
    TOO_THIN,
    Case,
    Size,
    solid,
)
from tests.corpus.encoded import FORMATS, MIMES
from tests.corpus.scenes import PALETTE, RED, quadrants
from tests.corpus.writers import bmp, boxes, gif, jpeg, png, tiff, webp
from tests.pictures import encode

_HUNDRED_MEGAPIXELS: Size = (10_000, 10_000)
_BOMB: Size = (12_000, 12_000)
_FEW = b"\x12\x34\x56\x78\x9a"


def _lossy_webp(size: Size) -> bytes:
    data = encode(quadrants(), "WEBP", quality=90)
    at = data.index(b"\x9d\x01\x2a") + 3
    return data[:at] + struct.pack("<HH", *size) + data[at + 4 :]


def _webp(size: Size) -> bytes:
    """The lossy bitstream has 14 bits for a side; a larger size is declared as a canvas."""
    if max(size) <= webp.MAX_SIDE:
        return _lossy_webp(size)
    return webp.riff(webp.vp8x(*size), webp.vp8l(96, 64, RED))


# Files that declare a size and contain hardly any pixels.
ANNOUNCING: dict[str, Callable[[Size], bytes]] = {
    "jpeg": lambda size: jpeg.jpeg(jpeg.tables(), jpeg.sof(size, [(1, 1)]), jpeg.sos(1), _FEW),
    "png": lambda size: png.png(png.ihdr(*size), png.chunk(b"IDAT", b"\x78\x9c" + _FEW)),
    "webp": _webp,
    "gif": lambda size: gif.screen(*size, PALETTE) + gif.frame(size, b"\x02" + _FEW) + gif.TRAILER,
    "bmp": lambda size: bmp.bmp(bmp.Dib(*size, 24).packed(), b"", _FEW),
    "tiff": lambda size: tiff.tiff(size, [_FEW]),
    "avif": lambda size: boxes.with_ispe(FORMATS["avif"](quadrants()), *size),
    "heic": lambda size: boxes.with_ispe(FORMATS["heic"](quadrants()), *size),
}


def _deflated_tiff(size: Size) -> bytes:
    width, height = size
    data = png.zlib_repeated(bytes(RED) * width * 50, height // 50)
    compressed = tiff.Tag(tiff.COMPRESSION, tiff.SHORT, [tiff.DEFLATE])
    return tiff.tiff(size, [data], (8, 8, 8), tiff.RGB, compressed)


def _rle_bmp(size: Size) -> bytes:
    width, height = size
    line = b"\xff\0" * (width // 255) + bytes([width % 255, 0]) + b"\0\0"
    header = bmp.Dib(*size, 8, bmp.RLE8, 2).packed()
    return bmp.bmp(header, bmp.palette([RED, RED]), line * height + b"\0\1")


def _grey_jpeg(size: Size) -> bytes:
    head = jpeg.tables() + jpeg.sof(size, [(1, 1)]) + jpeg.sos(1)
    return jpeg.jpeg(head, jpeg.grey_blocks(size))


def _one_color_gif(size: Size) -> bytes:
    data = gif.one_color(size[0] * size[1])
    return gif.screen(*size, PALETTE) + gif.frame(size, data) + gif.TRAILER


# Small files that really contain all the pixels.
BOMBS: dict[str, Callable[[Size], bytes]] = {
    "jpeg": _grey_jpeg,
    "png": lambda size: png.one_color(*size, bytes(RED)),
    "webp": lambda size: webp.riff(webp.vp8l(*size, RED)),
    "gif": _one_color_gif,
    "bmp": _rle_bmp,
    "tiff": _deflated_tiff,
}


def cases() -> Iterator[Case]:
    for kind, mime in MIMES.items():
        yield from _tiny_and_thin(kind, mime)
        yield from _announced(kind, mime)
    for kind, bomb in BOMBS.items():
        make = functools.partial(bomb, _HUNDRED_MEGAPIXELS)
        yield Case(f"{kind}/100-megapixels", make, ACCEPTED, MIMES[kind])
        make = functools.partial(bomb, _BOMB)
        yield Case(f"{kind}/bomb-144-megapixels", make, TOO_LARGE, MIMES[kind])
    yield from _heavy()
    yield from _lying()


def _tiny_and_thin(kind: str, mime: str) -> Iterator[Case]:
    def real(size: Size) -> Callable[[], bytes]:
        return lambda: FORMATS[kind](Image.new("RGB", size, RED))

    yield Case(f"{kind}/1x1", real((1, 1)), solid(RED, (1, 1), 40), mime)
    yield Case(f"{kind}/2x3", real((2, 3)), solid(RED, (2, 3), 40), mime)
    length = webp.MAX_SIDE if kind == "webp" else 30_000
    if kind in ("avif", "heic"):  # their encoders take too long for such a picture
        announced = ANNOUNCING[kind]
        yield Case(f"{kind}/1x30000", lambda: announced((1, 30_000)), TOO_THIN, mime)
        yield Case(f"{kind}/30000x1", lambda: announced((30_000, 1)), TOO_THIN, mime)
    else:
        yield Case(f"{kind}/1x{length}", real((1, length)), TOO_THIN, mime)
        yield Case(f"{kind}/{length}x1", real((length, 1)), TOO_THIN, mime)


def _announced(kind: str, mime: str) -> Iterator[Case]:
    def announced(size: Size) -> Callable[[], bytes]:
        return lambda: ANNOUNCING[kind](size)

    yield Case(f"{kind}/announces-20000x20000", announced((20_000, 20_000)), TOO_LARGE, mime)
    yield Case(f"{kind}/announces-40000x1000", announced((40_000, 1_000)), TOO_LARGE, mime)
    yield Case(f"{kind}/announces-1000x40000", announced((1_000, 40_000)), TOO_LARGE, mime)
    # AVIF declares the size to which its picture is scaled, even if the picture is tiny.
    expected = SURVIVES if kind == "avif" else INVALID
    few = announced((8_000, 8_000))
    yield Case(f"{kind}/announces-8000x8000-in-few-bytes", few, expected, mime)


def _heavy() -> Iterator[Case]:
    """Sizes at the limit, in the forms that take most memory or time."""
    transparent = bytes((*RED, 128))
    size = _HUNDRED_MEGAPIXELS
    yield Case(
        "png/100-megapixels-rgba", lambda: png.one_color(*size, transparent, png.RGBA), ACCEPTED
    )
    yield Case(
        "png/100-megapixels-of-16-bits",
        lambda: png.one_color(*size, bytes(8), png.RGBA, 16),
        ACCEPTED,
    )
    yield Case("png/100-megapixels-of-1-bit", lambda: png.one_color(*size, b"\xaa", 0, 1), ACCEPTED)
    yield Case("png/20000x20000", lambda: png.one_color(20_000, 20_000, bytes(RED)), TOO_LARGE)
    yield Case("png/longest-side", lambda: png.one_color(32_768, 400, bytes(RED)), ACCEPTED)
    yield Case("png/200-to-1", lambda: png.one_color(6_000, 30, bytes(RED)), ACCEPTED)
    yield Case("png/201-to-1", lambda: png.one_color(6_030, 30, bytes(RED)), TOO_THIN)
    yield Case("png/more-than-50-mib", lambda: encode(quadrants()) + bytes(50 << 20), TOO_LARGE)


def _lying() -> Iterator[Case]:
    """1x1 is declared, and much more data follows."""
    pixels = png.zlib_repeated(b"\0" * 1_000_000, 100)
    yield Case(
        "png/announces-1x1", lambda: png.png(png.ihdr(1, 1), png.chunk(b"IDAT", pixels)), SURVIVES
    )
    for kind in ("jpeg", "webp", "gif", "bmp", "tiff", "avif", "heic"):
        yield Case(
            f"{kind}/announces-1x1", functools.partial(_one_by_one, kind), SURVIVES, MIMES[kind]
        )


def _one_by_one(kind: str) -> bytes:
    if kind == "jpeg":
        return jpeg.patched_size(FORMATS[kind](quadrants()), (1, 1))
    if kind == "gif":
        data = gif.one_color(10_000_000)
        return gif.screen(1, 1, PALETTE) + gif.frame((1, 1), data) + gif.TRAILER
    if kind == "bmp":
        return bmp.bmp(bmp.Dib(1, 1, 24).packed(), b"", bytes(1 << 20))
    if kind == "tiff":
        return tiff.tiff((1, 1), [bytes(1 << 20)])
    return ANNOUNCING[kind]((1, 1))

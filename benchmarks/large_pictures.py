"""Files of 100 megapixels in every format and mode, most of them of few bytes."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests import hostile_pdfs
from tests.corpus.writers import bmp, gif, icc, png, tiff

SIDE = 10_000
_SIZE = (SIDE, SIDE)


def makers() -> dict[str, Callable[[], bytes]]:
    """Functions that make the files, by the format and the mode. A name that ends with "frame 1"
    is of an animation, of which the second frame is to be decoded."""
    return {**_jpegs(), **_pngs(), **_webps(), **_gifs(), **_bmps(), **_tiffs(), **_others()}


def picture(mode: str, size: tuple[int, int] = _SIZE) -> Image.Image:
    """A smooth picture, which encoders are fast with."""
    grey = Image.linear_gradient("L").resize(size)
    if mode == "PA":
        grey = grey.convert("P")
    return grey.convert(mode)


def _saved(mode: str, kind: str, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        file = io.BytesIO()
        picture(mode).save(file, kind, **options)
        return file.getvalue()

    return make


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _jpegs() -> dict[str, Callable[[], bytes]]:
    return {
        "JPEG": _saved("RGB", "JPEG"),
        "JPEG 4:4:4": _saved("RGB", "JPEG", subsampling="4:4:4"),
        "JPEG grey": _saved("L", "JPEG"),
        "JPEG CMYK": _saved("CMYK", "JPEG"),
        "JPEG progressive": _saved("RGB", "JPEG", progressive=True),
        "JPEG progressive 4:4:4": _saved("RGB", "JPEG", progressive=True, subsampling="4:4:4"),
        "JPEG progressive CMYK": _saved("CMYK", "JPEG", progressive=True),
        "JPEG turned": _saved("RGB", "JPEG", exif=_exif(6)),
        "JPEG profile": _saved("RGB", "JPEG", icc_profile=icc.profile()),
        "JPEG several": _several_jpegs,
    }


def _several_jpegs() -> bytes:
    file = io.BytesIO()
    first = picture("RGB")
    first.save(file, "MPO", save_all=True, append_images=[first])
    return file.getvalue()


def _png(
    colour: int, bits: int, *chunks: bytes, pixel: bytes = b"", interlaced: bool = False
) -> Callable[[], bytes]:
    channels = {png.GREY: 1, png.RGB: 3, png.PALETTE: 1, png.GREY_ALPHA: 2, png.RGBA: 4}[colour]
    step = channels * bits

    def make() -> bytes:
        if interlaced:
            nbytes = 0
            for x, y, dx, dy in _ADAM7:
                columns, rows = len(range(x, SIDE, dx)), len(range(y, SIDE, dy))
                nbytes += rows * (1 + -(-columns * step // 8))
            data = zlib.compress(bytes(nbytes), 1)
        else:
            row = b"\0" + (pixel * SIDE or bytes(-(-SIDE * step // 8)))
            data = png.zlib_repeated(row * 50, SIDE // 50)
        header = png.ihdr(SIDE, SIDE, bits, colour, interlace=int(interlaced))
        return png.png(header, *chunks, png.chunk(b"IDAT", data))

    return make


# Start and step of each pass: x, y, dx, dy.
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip


def _pngs() -> dict[str, Callable[[], bytes]]:
    palette = png.chunk(b"PLTE", bytes(range(48)))
    profile = png.chunk(b"iCCP", b"P3\0\0" + zlib.compress(icc.profile()))
    kinds: dict[str, Callable[[], bytes]] = {}
    for name, colour, depths in (
        ("grey", png.GREY, (1, 2, 4, 8, 16)),
        ("RGB", png.RGB, (8, 16)),
        ("palette", png.PALETTE, (1, 2, 4, 8)),
        ("grey+alpha", png.GREY_ALPHA, (8, 16)),
        ("RGBA", png.RGBA, (8, 16)),
    ):
        more = [palette] if colour == png.PALETTE else []
        for bits in depths:
            kinds[f"PNG {name} {bits}"] = _png(colour, bits, *more)
            kinds[f"PNG {name} {bits} interlaced"] = _png(colour, bits, *more, interlaced=True)
    grey_key, key = png.chunk(b"tRNS", bytes(2)), png.chunk(b"tRNS", bytes(6))
    return kinds | {
        "PNG grey 8 transparent": _png(png.GREY, 8, grey_key),
        "PNG grey 16 transparent": _png(png.GREY, 16, grey_key),
        "PNG RGB 8 transparent": _png(png.RGB, 8, key),
        "PNG RGB 16 transparent": _png(png.RGB, 16, key),
        "PNG palette 8 transparent": _png(png.PALETTE, 8, palette, png.chunk(b"tRNS", b"\0\x80")),
        "PNG RGB 8 profile": _png(png.RGB, 8, profile),
        "PNG RGBA 8 profile": _png(png.RGBA, 8, profile),
        "PNG RGB 16 profile": _png(png.RGB, 16, profile),
        "PNG RGB 8 turned": _png(png.RGB, 8, png.chunk(b"eXIf", _exif(6).tobytes()[6:])),
        "PNG animated": _apng,
        "PNG animated frame 1": _apng,
    }


def _apng() -> bytes:
    """Two frames in RGBA."""

    def control(number: int) -> bytes:
        return png.chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, SIDE, SIDE, 0, 0, 1, 10, 0, 1))

    data = png.zlib_repeated(b"\0" + bytes(4 * SIDE), SIDE)
    return png.png(
        png.ihdr(SIDE, SIDE, 8, png.RGBA),
        png.chunk(b"acTL", struct.pack(">II", 2, 0)),
        control(0),
        png.chunk(b"IDAT", data),
        control(1),
        png.chunk(b"fdAT", struct.pack(">I", 2) + data),
    )


def _animated(mode: str, kind: str, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        file = io.BytesIO()
        first = picture(mode)
        second = first.transpose(Image.Transpose.ROTATE_180)
        first.save(file, kind, save_all=True, append_images=[second], **options)
        return file.getvalue()

    return make


def _webps() -> dict[str, Callable[[], bytes]]:
    fast = {"method": 0}
    animated = _animated("RGB", "WEBP", **fast)
    return {
        "WebP": _saved("RGB", "WEBP", **fast),
        "WebP alpha": _saved("RGBA", "WEBP", **fast),
        "WebP lossless": _saved("RGB", "WEBP", lossless=True, quality=0, **fast),
        "WebP lossless alpha": _saved("RGBA", "WEBP", lossless=True, quality=0, **fast),
        "WebP turned": _saved("RGB", "WEBP", exif=_exif(6), **fast),
        "WebP animated": animated,
        "WebP animated frame 1": animated,
    }


def _gifs() -> dict[str, Callable[[], bytes]]:
    palette = bytes(range(12))
    still = gif.frame(_SIZE, gif.one_color(SIDE * SIDE))
    # A frame that covers half of the screen shows what is behind it.
    half = gif.control(5, 1) + gif.frame((SIDE // 2, SIDE), gif.one_color(SIDE * SIDE // 2))
    screen = gif.screen(*_SIZE, palette)
    return {
        "GIF": lambda: screen + still + gif.TRAILER,
        "GIF transparent": lambda: screen + gif.control(0, 1) + still + gif.TRAILER,
        "GIF interlaced": lambda: (
            screen + gif.frame(_SIZE, gif.one_color(SIDE**2), interlaced=True) + gif.TRAILER
        ),
        "GIF animated frame 1": lambda: screen + gif.control(5) + still + half + gif.TRAILER,
        "GIF animated transparent frame 1": lambda: (
            screen + gif.control(5, 1) + still + half + half + gif.TRAILER
        ),
    }


def _bmps() -> dict[str, Callable[[], bytes]]:
    def packed(depth: int) -> Callable[[], bytes]:
        colours = bmp.palette([(n, 0, 255 - n) for n in range(1 << depth)])
        header = bmp.Dib(SIDE, SIDE, depth, colors=1 << depth).packed()
        return lambda: bmp.bmp(header, colours, bytes(-(-SIDE * depth // 32) * 4 * SIDE))

    runs = (b"\xfa\x01" * (SIDE // 250) + b"\0\0") * SIDE + b"\0\1"
    header = bmp.Dib(SIDE, SIDE, 8, compression=bmp.RLE8, colors=256).packed()
    coloured = bmp.palette([(n, 0, 255 - n) for n in range(256)])
    return {
        "BMP 1": packed(1),
        "BMP 4": packed(4),
        "BMP RLE8": lambda: bmp.bmp(header, coloured, runs),
    }


def _tiff(
    bits: tuple[int, ...], photometric: int, *more: tiff.Tag, planar: bool = False
) -> Callable[[], bytes]:
    """Strips of 100 rows of zeros."""

    def make() -> bytes:
        together = 1 if planar else len(bits)
        strip = zlib.compress(bytes(100 * SIDE * bits[0] * together // 8))
        tags = [tiff.Tag(tiff.COMPRESSION, tiff.SHORT, [tiff.DEFLATE]), *more]
        if planar:
            tags.append(tiff.Tag(tiff.PLANAR, tiff.SHORT, [2]))
        strips = [strip] * (SIDE // 100 * len(bits) // together)
        return tiff.tiff(_SIZE, strips, bits, photometric, *tags)

    return make


def _tiled(bits: tuple[int, ...], photometric: int, side: int) -> Callable[[], bytes]:
    def make() -> bytes:
        tile = zlib.compress(bytes(side * side * len(bits) * bits[0] // 8))
        count = (-(-SIDE // side)) ** 2
        tags = tiff.picture_tags(_SIZE, bits, photometric)
        tags += [
            tiff.Tag(tiff.COMPRESSION, tiff.SHORT, [tiff.DEFLATE]),
            tiff.Tag(tiff.TILE_WIDTH, tiff.LONG, [side]),
            tiff.Tag(tiff.TILE_HEIGHT, tiff.LONG, [side]),
            tiff.Tag(tiff.TILE_OFFSETS, tiff.LONG, [8 + n * len(tile) for n in range(count)]),
            tiff.Tag(tiff.TILE_BYTES, tiff.LONG, [len(tile)] * count),
        ]
        body = tile * count + bytes(len(tile) * count % 2)
        return tiff.LITTLE.header(8 + len(body)) + body + tiff.LITTLE.ifd(tags, 8 + len(body))

    return make


def _tiffs() -> dict[str, Callable[[], bytes]]:
    alpha = tiff.Tag(338, tiff.SHORT, [2])
    premultiplied = tiff.Tag(338, tiff.SHORT, [1])
    floats, signed = (tiff.Tag(tiff.SAMPLE_FORMAT, tiff.SHORT, [kind]) for kind in (3, 2))
    palette = tiff.Tag(tiff.COLOR_MAP, tiff.SHORT, list(range(768)))
    kinds = {
        "grey 1": _tiff((1,), tiff.GREY),
        "grey 4": _tiff((4,), tiff.GREY),
        "grey 8": _tiff((8,), tiff.GREY),
        "grey 16": _tiff((16,), tiff.GREY),
        "grey 16, white is 0": _tiff((16,), tiff.WHITE_IS_ZERO),
        "signed 16": _tiff((16,), tiff.GREY, signed),
        "signed 32": _tiff((32,), tiff.GREY, signed),
        "float": _tiff((32,), tiff.GREY, floats),
        "palette": _tiff((8,), tiff.PALETTE, palette),
        "grey+alpha": _tiff((8, 8), tiff.GREY, alpha),
        "RGB": _tiff((8, 8, 8), tiff.RGB),
        "RGB 16": _tiff((16, 16, 16), tiff.RGB),
        "RGBX": _tiff((8, 8, 8, 8), tiff.RGB, tiff.Tag(338, tiff.SHORT, [0])),
        "RGBA": _tiff((8, 8, 8, 8), tiff.RGB, alpha),
        "RGBA premultiplied": _tiff((8, 8, 8, 8), tiff.RGB, premultiplied),
        "RGBA 16": _tiff((16, 16, 16, 16), tiff.RGB, alpha),
        "CMYK": _tiff((8, 8, 8, 8), tiff.CMYK),
        "CMYK 16": _tiff((16, 16, 16, 16), tiff.CMYK),
        "Lab": _tiff((8, 8, 8), tiff.LAB),
        "RGB planar": _tiff((8, 8, 8), tiff.RGB, planar=True),
        "CMYK planar": _tiff((8, 8, 8, 8), tiff.CMYK, planar=True),
        "RGBA planar": _tiff((8, 8, 8, 8), tiff.RGB, alpha, planar=True),
        "RGB tiled": _tiled((8, 8, 8), tiff.RGB, 256),
        "RGB in tiles of 5008": _tiled((8, 8, 8), tiff.RGB, 5008),
        "RGB turned": _tiff((8, 8, 8), tiff.RGB, tiff.Tag(tiff.ORIENTATION, tiff.SHORT, [6])),
        "RGB in one strip": lambda: tiff.tiff(
            _SIZE,
            [zlib.compress(bytes(3 * SIDE * SIDE))],
            (8, 8, 8),
            tiff.RGB,
            tiff.Tag(tiff.COMPRESSION, tiff.SHORT, [tiff.DEFLATE]),
        ),
        "RGB LZW": _saved("RGB", "TIFF", compression="tiff_lzw"),
        "RGB packbits": _saved("RGB", "TIFF", compression="packbits"),
        "RGB JPEG": _saved("RGB", "TIFF", compression="jpeg"),
        "CMYK LZW": _saved("CMYK", "TIFF", compression="tiff_lzw"),
        "YCbCr LZW": _saved("YCbCr", "TIFF", compression="tiff_lzw"),
        "fax": _saved("1", "TIFF", compression="group4"),
        "CMYK profile": _saved("CMYK", "TIFF", compression="tiff_lzw", icc_profile=icc.profile()),
    }
    return {f"TIFF {name}": make for name, make in kinds.items()}


def _others() -> dict[str, Callable[[], bytes]]:
    fast = {"speed": 10, "max_threads": 2}
    animated = _animated("RGB", "AVIF", **fast)
    return {
        "AVIF": _saved("RGB", "AVIF", **fast),
        "AVIF 4:4:4": _saved("RGB", "AVIF", subsampling="4:4:4", **fast),
        "AVIF alpha": _saved("RGBA", "AVIF", **fast),
        "AVIF turned": _saved("RGB", "AVIF", exif=_exif(6), **fast),
        "AVIF animated": animated,
        "AVIF animated frame 1": animated,
        "HEIF": _heif("RGB"),
        "HEIF alpha": _heif("RGBA"),
        "HEIF grey": _heif("L"),
        "HEIF 10 bits": _heif("RGB;16"),
        "HEIF 4:4:4": _heif("RGB", chroma=444),
        "PDF": lambda: hostile_pdfs.page(b"/MediaBox [0 0 200000 200000]"),
        "PDF with a picture": lambda: hostile_pdfs.large_picture(10_000),
    }


def _heif(mode: str, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        import pillow_heif

        file = io.BytesIO()
        if mode == "RGB;16":
            rows = np.zeros((SIDE, SIDE * 3), np.uint16)
            heif = pillow_heif.from_bytes(mode, _SIZE, rows.tobytes())
        else:
            heif = pillow_heif.from_pillow(picture(mode))
        heif.save(file, quality=30, enc_params={"preset": "ultrafast"}, **options)
        return file.getvalue()

    return make

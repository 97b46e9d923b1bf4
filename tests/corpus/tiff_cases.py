"""TIFF: every layout, compression and colour space, and invalid directories."""

import functools
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

from tests.corpus.cases import (
    ACCEPTED,
    INVALID,
    INVALID_OR_UNSUPPORTED,
    SURVIVES,
    Case,
    Expectation,
    named,
    seen,
    solid,
)
from tests.corpus.scenes import CORNERS, SIZE, circle, indices, quadrants, upright
from tests.corpus.writers import png, tiff
from tests.corpus.writers.tiff import LONG, SHORT, Layout, Tag
from tests.pictures import encode

Group = Iterator[tuple[str, Callable[[], bytes], Expectation]]
_RIGHT = upright(2)
_BIG_ENDIAN = Layout(">")


def _rgb() -> np.ndarray:
    return np.asarray(quadrants())


def cases() -> Iterator[Case]:
    for group in (_layouts(), _compressions(), _pixels(), _directories(), _strips()):
        for name, make, expected in group:
            yield Case(f"tiff/{name}", make, expected, "image/tiff")


def _layouts() -> Group:
    rows = [_rgb()[at : at + 8].tobytes() for at in range(0, 64, 8)]
    planes = [_rgb()[..., channel].tobytes() for channel in range(3)]
    yield "one-strip", lambda: tiff.tiff(SIZE, [_rgb().tobytes()]), _RIGHT
    yield "eight-strips", lambda: tiff.tiff(SIZE, rows), _RIGHT
    yield "a-strip-each-row", lambda: tiff.tiff(SIZE, [row.tobytes() for row in _rgb()]), _RIGHT
    yield "big-endian", lambda: tiff.tiff(SIZE, rows, layout=_BIG_ENDIAN), _RIGHT
    yield "bigtiff", lambda: tiff.tiff(SIZE, rows, layout=tiff.BIG), _RIGHT
    yield "bigtiff-big-endian", lambda: tiff.tiff(SIZE, rows, layout=Layout(">", True)), SURVIVES
    yield "planes", lambda: _tagged(planes, Tag(tiff.PLANAR, SHORT, [2])), _RIGHT
    yield "tiles", _tiled, _RIGHT
    yield "tiles-of-0x0", lambda: _tiled(0), INVALID
    yield "tiles-of-odd-size", lambda: _tiled(17), SURVIVES
    yield "tile-larger-than-the-picture", lambda: _tiled(1 << 20), SURVIVES


def _tagged(data: list[bytes], *more: Tag, **options: object) -> bytes:
    return tiff.tiff(SIZE, data, (8, 8, 8), tiff.RGB, *more, **options)  # type: ignore[arg-type]


def _tiled(side: int | None = None) -> bytes:
    """Tiles of 32x32 that are declared with `side`."""
    tiles = [
        _rgb()[y : y + 32, x : x + 32].tobytes() for y in range(0, 64, 32) for x in range(0, 96, 32)
    ]
    said = 32 if side is None else side
    offsets = [8 + 3072 * number for number in range(len(tiles))]
    tags = tiff.picture_tags(SIZE, (8, 8, 8), tiff.RGB)
    tags += [Tag(tiff.COMPRESSION, SHORT, [1])]
    tags += [Tag(tiff.TILE_WIDTH, LONG, [said]), Tag(tiff.TILE_HEIGHT, LONG, [said])]
    tags += [Tag(tiff.TILE_OFFSETS, LONG, offsets), Tag(tiff.TILE_BYTES, LONG, [3072] * 6)]
    body = b"".join(tiles)
    return tiff.LITTLE.header(8 + len(body)) + body + tiff.LITTLE.ifd(tags, 8 + len(body))


def _compressions() -> Group:
    def pillow(compression: str, image: Image.Image) -> Callable[[], bytes]:
        return lambda: encode(image, "TIFF", compression=compression)

    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield name.replace("_", "-"), pillow(name, quadrants()), _RIGHT
    yield "jpeg-inside", pillow("jpeg", quadrants()), upright(20)
    bilevel = Image.fromarray((indices() % 2 * 255).astype(np.uint8)).convert("1")
    black_and_white = seen(((0,) * 3, (255,) * 3) * 2, SIZE, 2)
    for name in ("group3", "group4"):
        yield f"fax-{name}", pillow(name, bilevel), black_and_white
    yield "deflate-bomb-in-a-strip", _overlong, SURVIVES
    for code in (tiff.LZW, tiff.DEFLATE, tiff.JPEG, tiff.OLD_JPEG, 4, 50_000, 50_001):
        wrong = Tag(tiff.COMPRESSION, SHORT, [code])
        yield (
            f"noise-as-compression-{code}",
            functools.partial(_noise, wrong),
            INVALID_OR_UNSUPPORTED,
        )
    yield (
        "compression-unknown",
        lambda: _noise(Tag(tiff.COMPRESSION, SHORT, [9999])),
        INVALID_OR_UNSUPPORTED,
    )


def _overlong() -> bytes:
    """A strip of a megabyte that unpacks to a gigabyte."""
    data = png.zlib_repeated(bytes(1 << 20), 1024)
    return _tagged([data], Tag(tiff.COMPRESSION, SHORT, [tiff.DEFLATE]))


def _noise(compression: Tag) -> bytes:
    data = np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes()
    return _tagged([data], compression)


def _pixels() -> Group:
    yield "rgb-16-bit", lambda: _deep(np.uint16, 257), _RIGHT
    yield "rgb-16-bit-big-endian", lambda: _deep(np.uint16, 257, _BIG_ENDIAN), _RIGHT
    yield "rgb-16-bit-circle", _deep_circle, named("a red circle")
    yield "rgb-32-bit", lambda: _deep(np.uint32, 1 << 24), SURVIVES
    yield "rgb-float-0-to-1", lambda: _float((8, 8, 8)), SURVIVES
    yield "grey-16-bit", _grey_16, solid((128,) * 3, SIZE, 3)
    yield "grey-float-0-to-1", lambda: _float((8,)), SURVIVES
    yield "grey-float-not-numbers", _not_numbers, SURVIVES
    yield "cmyk", lambda: encode(quadrants().convert("CMYK"), "TIFF"), upright(110)
    yield "cmyk-circle", lambda: encode(circle().convert("CMYK"), "TIFF"), named("a red circle")
    yield "lab-circle", lambda: _lab(circle()), named("a red circle")
    yield "lab", lambda: _lab(quadrants()), upright(30)
    yield "palette", _paletted, _RIGHT
    yield "palette-missing", lambda: _paletted(b""), INVALID
    yield "white-is-zero", _inverted, solid((255 - 90,) * 3, SIZE, 2)
    yield "rgba", lambda: encode(quadrants().convert("RGBA"), "TIFF"), _RIGHT
    yield "two-pages", _two_pages, _RIGHT
    yield "seven-samples", lambda: _many_samples(7), SURVIVES
    yield "samples-65535", lambda: _many_samples(65_535), INVALID
    yield "samples-0", lambda: _many_samples(0), INVALID
    yield "bits-0", lambda: tiff.tiff(SIZE, [bytes(6144)], (0,), tiff.GREY), INVALID
    yield "bits-3", lambda: tiff.tiff(SIZE, [bytes(6144)], (3,), tiff.GREY), SURVIVES
    yield "photometric-unknown", lambda: _tagged([_rgb().tobytes()], _photometric(999)), SURVIVES


def _photometric(value: int) -> Tag:
    return Tag(tiff.PHOTOMETRIC, SHORT, [value])


def _deep(dtype: type, factor: int, layout: Layout = tiff.LITTLE) -> bytes:
    pixels: np.ndarray = (_rgb().astype(np.uint64) * factor).astype(dtype)
    bits = (8 * pixels.itemsize,) * 3
    return tiff.tiff(SIZE, [tiff.samples(pixels, layout)], bits, layout=layout)


def _deep_circle() -> bytes:
    pixels = np.asarray(circle()).astype(np.uint16) * 257
    return tiff.tiff(circle().size, [tiff.samples(pixels)], (16, 16, 16))


def _float(shape: tuple[int, ...]) -> bytes:
    pixels = (_rgb() / 255).astype(np.float32)[..., : len(shape)]
    kind = Tag(tiff.SAMPLE_FORMAT, SHORT, [3] * len(shape))
    photometric = tiff.RGB if len(shape) == 3 else tiff.GREY
    return tiff.tiff(SIZE, [tiff.samples(pixels)], (32,) * len(shape), photometric, kind)


def _not_numbers() -> bytes:
    pixels = np.full(SIZE[::-1], np.nan, np.float32)
    pixels[::2] = np.inf
    kind = Tag(tiff.SAMPLE_FORMAT, SHORT, [3])
    return tiff.tiff(SIZE, [tiff.samples(pixels)], (32,), tiff.GREY, kind)


def _grey_16() -> bytes:
    pixels = np.full(SIZE[::-1], 0x8080, np.uint16)
    return tiff.tiff(SIZE, [tiff.samples(pixels)], (16,), tiff.GREY)


def _lab(image: Image.Image) -> bytes:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert converted is not None
    del converted.info["icc_profile"]  # it contains the time of day
    return encode(converted, "TIFF")


def _paletted(colors: bytes | None = None) -> bytes:
    table = np.zeros((3, 256), np.uint16)
    table[:, :4] = np.array(CORNERS, np.uint16).T * 257
    values = [int(value) for value in table.ravel()]
    more = [] if colors == b"" else [Tag(tiff.COLOR_MAP, SHORT, values)]
    return tiff.tiff(SIZE, [indices().tobytes()], (8,), tiff.PALETTE, *more)


def _inverted() -> bytes:
    return tiff.tiff(SIZE, [bytes([90]) * (SIZE[0] * SIZE[1])], (8,), tiff.WHITE_IS_ZERO)


def _two_pages() -> bytes:
    return encode(quadrants(), "TIFF", save_all=True, append_images=[quadrants().rotate(180)])


def _many_samples(number: int) -> bytes:
    count = Tag(tiff.SAMPLES, SHORT, [number])
    return _tagged([bytes(96 * 64 * 7)], count, Tag(tiff.BITS, SHORT, [8] * min(number, 7)))


def _directories() -> Group:
    data = _rgb().tobytes()
    yield "directory-follows-itself", lambda: _tagged([data], next_ifd=8 + len(data)), _RIGHT
    yield "next-directory-beyond-the-end", lambda: _tagged([data], next_ifd=1 << 30), SURVIVES
    yield "directories-100000", lambda: _chained(100_000), SURVIVES
    yield "directory-beyond-the-end", lambda: tiff.LITTLE.header(1 << 20) + bytes(20), INVALID
    yield "directory-at-0", lambda: tiff.LITTLE.header(0) + bytes(20), INVALID
    yield "no-tags", lambda: tiff.LITTLE.header(8) + tiff.LITTLE.ifd([], 8), INVALID
    yield "tags-65535-announced", lambda: tiff.LITTLE.header(8) + b"\xff\xff" + bytes(100), INVALID
    yield "bigtiff-tags-of-2-to-60", _endless_bigtiff, INVALID
    yield "tag-count-of-4-billion", lambda: _with_tag(count=0xFFFFFFFF), SURVIVES
    yield "tag-value-beyond-the-end", lambda: _with_tag(count=100, offset=1 << 31), SURVIVES
    yield "strips-4-billion", lambda: _tagged(
        [data], Tag(tiff.STRIP_OFFSETS, LONG, [8], count=0xFFFFFFFF)
    ), INVALID  # fmt: skip
    yield "tags-unsorted-and-twice", _twice, SURVIVES
    yield "sub-directory-is-itself", lambda: _tagged(
        [data], Tag(tiff.SUB_IFDS, LONG, [8 + len(data)])
    ), _RIGHT  # fmt: skip
    yield "no-width", lambda: _tagged([data], Tag(tiff.WIDTH, LONG, [])), INVALID
    yield "width-0", lambda: _tagged([data], Tag(tiff.WIDTH, LONG, [0])), INVALID
    yield "version-99", lambda: b"II\x63\0" + _tagged([data])[4:], SURVIVES


def _chained(number: int) -> bytes:
    """A picture followed by `number` directories of one tag."""
    first = _tagged([_rgb().tobytes()])
    at = len(first)
    entry = struct.pack("<HHHII", 1, tiff.WIDTH, LONG, 1, 1)
    chain = b"".join(entry + struct.pack("<I", at + 18 * (n + 1)) for n in range(number))
    return _tagged([_rgb().tobytes()], next_ifd=at) + chain[:-4] + bytes(4)


def _endless_bigtiff() -> bytes:
    return tiff.BIG.header(16) + struct.pack("<Q", 1 << 60) + bytes(200)


def _with_tag(count: int, offset: int = 8) -> bytes:
    """A private tag that declares `count` values at `offset`."""
    return _tagged([_rgb().tobytes()], Tag(40_000, LONG, [], count, offset))


def _twice() -> bytes:
    data = _tagged([_rgb().tobytes()])
    at = struct.unpack_from("<I", data, 4)[0] + 2
    first, second = data[at : at + 12], data[at + 12 : at + 24]
    return data[:at] + second + first + data[at + 24 :]


def _strips() -> Group:
    data = _rgb().tobytes()
    offsets = functools.partial(Tag, tiff.STRIP_OFFSETS, LONG)
    counts = functools.partial(Tag, tiff.STRIP_BYTES, LONG)
    yield "strip-beyond-the-end", lambda: _tagged([data], offsets([1 << 30])), INVALID
    yield "strip-overlaps-the-end", lambda: _tagged([data], offsets([10_000])), INVALID
    yield "strip-of-0-bytes", lambda: _tagged([data], counts([0])), SURVIVES
    yield "strip-of-4-gb", lambda: _tagged([data], counts([0xFFFFFFFF])), SURVIVES
    yield "strips-missing", lambda: _tagged([data], offsets([])), INVALID
    yield "rows-a-strip-0", lambda: _tagged([data], Tag(tiff.ROWS, LONG, [0])), SURVIVES
    yield (
        "rows-a-strip-4-billion",
        lambda: _tagged([data], Tag(tiff.ROWS, LONG, [0xFFFFFFFF])),
        _RIGHT,
    )
    yield (
        "planes-of-4-pictures-in-one",
        lambda: _tagged([data], Tag(tiff.PLANAR, SHORT, [2])),
        SURVIVES,
    )
    yield (
        "transparent-white",
        lambda: encode(Image.new("RGBA", SIZE, (0, 0, 0, 0)), "TIFF"),
        ACCEPTED,
    )

"""The header reader agrees with the decoders, refuses invalid files, and does bounded work."""

import contextlib
import io
import itertools
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from server.errors import ClientError, InvalidImage, UnsupportedImageFormat
from server.imaging import header
from server.imaging.header import ImageHeader
from tests.fuzz.fuzz_header import (
    ORIENTATION,
    SIZE,
    box,
    chunk,
    clap,
    decoded_size,
    encode,
    exif,
    header_size,
    imir,
    irot,
    picture,
    profile,
    seeds,
    segment,
    with_checksums,
    with_chunks_at_end,
    with_properties,
    xmp,
)

WIDTH, HEIGHT = SIZE
SEEDS = seeds()

MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "AVIF": ("L", "RGB", "RGBA"),
    "HEIF": ("L", "RGB", "RGBA"),
}
WITHOUT_ORIENTATION = ("GIF", "BMP")


def _turned(kind: str, orientation: int) -> dict[str, Any]:
    """Options that write an orientation into a file of `kind`."""
    if kind == "TIFF":
        return {"tiffinfo": {ORIENTATION: orientation}}
    return {"exif": exif(orientation)}


@pytest.mark.parametrize("size", [(1, 1), (37, 23), (16, 301)])
@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes]
)
def test_every_format_mode_size_and_orientation_is_read(
    kind: str, mode: str, size: tuple[int, int]
) -> None:
    image = picture(mode, size)
    plain = encode(image, kind)
    assert header.read(plain) == ImageHeader(kind, *size)
    assert decoded_size(plain) == size
    for orientation in () if kind in WITHOUT_ORIENTATION else range(1, 9):
        data = encode(image, kind, **_turned(kind, orientation))
        found = header.read(data)
        assert found == ImageHeader(kind, *size, orientation)
        assert found.size == (size if orientation < 5 else size[::-1]) == decoded_size(data)


@pytest.mark.parametrize("name", SEEDS)
def test_sizes_of_seeds_match_the_decoders(name: str) -> None:
    found = header.read(SEEDS[name])
    assert found.format == name.split()[0].upper()
    assert found.size == decoded_size(SEEDS[name])
    frames = ("animated", "pages", "sequence")
    assert found.animated == any(word in name for word in frames)


# EXIF and XMP.


def _exif_value(order: str, type_: int, count: int, value: bytes) -> bytes:
    """EXIF with only an orientation, of any type; a value longer than four bytes follows it."""
    outside = value if len(value) > 4 else b""
    if outside:
        value = struct.pack(order + "I", 26)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    entry = struct.pack(order + "HHI4s", ORIENTATION, type_, count, value)
    return b"Exif\0\0" + head + entry + bytes(4) + outside


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("type_", "count", "form", "orientation"),
    [
        (3, 1, "H", 6),
        (3, 2, "HH", 6),  # the first counts
        (4, 1, "I", 6),
        (9, 1, "i", 6),
        (5, 1, "II", 6),
        (10, 1, "ii", 6),
        (11, 1, "f", 6),
        (12, 1, "d", 6),
        (1, 1, "B", 1),  # bytes and text are not numbers
        (2, 1, "B", 1),
        (7, 1, "B", 1),
        (99, 1, "H", 1),  # an unknown type
        (3, 0, "H", 1),  # no value
        (3, 1 << 30, "H", 1),  # more values than the file has bytes
    ],
)
def test_exif_orientation_of_any_type_is_read_as_pillow_reads_it(
    order: str, type_: int, count: int, form: str, orientation: int
) -> None:
    values = (6, 1)[: len(form)] if form != "HH" else (6, 3)
    data = _jpeg(exif=_exif_value(order, type_, count, struct.pack(order + form, *values)))
    assert header.read(data) == ImageHeader("JPEG", WIDTH, HEIGHT, orientation)
    assert header.read(data).size == decoded_size(data)


def test_the_first_exif_orientation_counts_after_an_oversized_tag() -> None:
    entries = [(271, 2, 1 << 30, 0), (274, 3, 1, 6 << 16), (274, 3, 1, 3 << 16)]
    data = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries))
    data += b"".join(struct.pack(">HHII", *entry) for entry in entries) + bytes(4)
    assert header.read(_jpeg(exif=data)) == ImageHeader("JPEG", WIDTH, HEIGHT, 6)
    assert decoded_size(_jpeg(exif=data)) == SIZE[::-1]


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_invalid_orientations_are_ignored(value: int) -> None:
    data = _jpeg(exif=_exif_value("<", 3, 1, struct.pack("<H", value)), xmp=xmp(6))
    assert header.read(data).orientation == 1
    assert header.read(data).size == decoded_size(data)


DAMAGED_EXIF = {
    "empty": b"Exif\0\0",
    "no header": b"Exif\0\0II*",
    "unknown header": b"Exif\0\0XX*\0" + bytes(20),
    "directory behind the end": b"Exif\0\0II*\0" + struct.pack("<I", 1000),
    "directory cut short": exif(6)[:30],
    "value behind the end": exif(6, "<").replace(b"\x4a\0\0\0", b"\xff\xff\0\0"),
    "said twice": b"Exif\0\0" + exif(6),
    "bigtiff": b"Exif\0\0II+\0" + bytes(20),
    "big-endian bigtiff": exif(6).replace(b"MM\0*", b"MM\0+"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", DAMAGED_EXIF)
def test_damaged_exif_is_read_as_pillow_reads_it(name: str, kind: str) -> None:
    for text in ({}, {"xmp": xmp(6)}):
        if kind == "PNG":
            data = with_chunks_at_end(SEEDS["png"], chunk(b"eXIf", DAMAGED_EXIF[name][6:]))
        else:
            data = encode(picture(), kind, exif=DAMAGED_EXIF[name], **text)
        assert header.read(data).size == decoded_size(data)


@pytest.mark.parametrize(
    ("text", "orientation"),
    [
        (xmp(6), 6),
        (xmp(8, element=True), 8),
        (b"tiff:Orientation='6'", 1),
        (b'tiff:Orientation="x" tiff:Orientation="7"', 7),
        (b'tiff:Orientation="0"', 1),
        (b" " * 50_000 + xmp(5), 5),
        (b"", 1),
    ],
)
def test_xmp_orientation_is_read(text: bytes, orientation: int) -> None:
    for kind in ("JPEG", "WEBP"):
        data = encode(picture(), kind, xmp=text)
        assert header.read(data) == ImageHeader(kind, WIDTH, HEIGHT, orientation)
        assert header.read(data).size == decoded_size(data)


# Unusual files of each format.


def _jpeg(**options: Any) -> bytes:
    return encode(picture(), "JPEG", **options)


def _frame(marker: int, size: tuple[int, int] = SIZE) -> bytes:
    width, height = size
    return segment(marker, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")


SCAN = segment(0xDA, b"\1\1\0\0\x3f\0")
THUMBNAIL = encode(picture(size=(160, 120)), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        SEEDS["jpeg"][:2] + segment(0xE0, b"JFXX\0\x10" + THUMBNAIL) + SEEDS["jpeg"][2:],
        SEEDS["jpeg"][:2] + segment(0xE1, exif(None) + THUMBNAIL) + SEEDS["jpeg"][2:],
        SEEDS["jpeg"][:2] + segment(0xFE, b"comment\xff\xc0") + SEEDS["jpeg"][2:],
        SEEDS["jpeg"][:2] + b"\xff\xe7\0\0" + SEEDS["jpeg"][2:],  # a length of 0
        SEEDS["jpeg"][:2] + b"\xff" * 300 + SEEDS["jpeg"][2:],
        SEEDS["jpeg"] + THUMBNAIL,
    ],
)
def test_the_size_of_an_embedded_jpeg_is_ignored(data: bytes) -> None:
    assert header.read(data) == ImageHeader("JPEG", WIDTH, HEIGHT)
    assert decoded_size(data) == SIZE


@pytest.mark.parametrize("marker", [0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA])
def test_every_decodable_jpeg_frame_type_is_read(marker: int) -> None:
    data = b"\xff\xd8" + _frame(marker) + SCAN
    assert header.read(data) == ImageHeader("JPEG", WIDTH, HEIGHT)


def _chunks(data: bytes, length: int) -> bytes:
    """A PNG with its image data in chunks of `length` bytes."""
    start, end = data.index(b"IDAT") - 4, len(data) - 12
    pixels = data[start + 8 : end - 4]
    parts = [chunk(b"IDAT", pixels[i : i + length]) for i in range(0, len(pixels), length)]
    return data[:start] + b"".join(parts) + data[end:]


PROFILE = b"Raw profile type exif\0"


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_png_metadata_after_many_chunks_is_read(length: int) -> None:
    many = _chunks(encode(Image.effect_noise((40, 30), 99), "PNG"), length)
    turned = with_chunks_at_end(many, chunk(b"IDAT", b""), chunk(b"eXIf", exif(6)[6:]))
    assert many.count(b"IDAT") > 128
    assert header.read(many) == ImageHeader("PNG", 40, 30)
    assert header.read(turned) == ImageHeader("PNG", 40, 30, 6)
    assert decoded_size(turned) == (30, 40)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"eXIf", exif(6)[6:]), chunk(b"eXIf", exif(3)[6:])],  # the last one counts
        [chunk(b"eXIf", exif(3)[6:]), chunk(b"eXIf", exif(6)[6:])],
        [chunk(b"eXIf", exif(6)[6:]), chunk(b"IEND", b""), chunk(b"eXIf", exif(1)[6:])],
        [chunk(b"\0\0\0\0", b""), chunk(b"eXIf", exif(6)[6:])],  # later chunks are ignored
        [chunk(b"eXIf", exif(1)[6:]), chunk(b"tEXt", PROFILE + profile(6).encode())],
        [chunk(b"tEXt", PROFILE + profile(6).encode()[:-2])],
        [chunk(b"tEXt", PROFILE + profile(6).encode() + b"z")],
        [chunk(b"tEXt", PROFILE + b"\n" * 9)],
        [chunk(b"zTXt", PROFILE + b"\0damaged")],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(6)))],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0damaged")],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)), chunk(b"eXIf", exif(None)[6:])],
    ],
)
def test_png_metadata_is_read_as_pillow_reads_it(chunks: list[bytes]) -> None:
    data = with_chunks_at_end(SEEDS["png"], *chunks)
    assert header.read(data).size == decoded_size(data) is not None


def test_webp_metadata_counts_only_if_its_flag_is_set() -> None:
    data = bytearray(SEEDS["webp exif"])
    assert header.read(bytes(data)).orientation == 6
    data[20] &= ~0x08  # EXIF
    assert header.read(bytes(data)).orientation == 3  # XMP's
    assert decoded_size(bytes(data)) == SIZE
    data[20] &= ~0x04
    assert header.read(bytes(data)).orientation == 1


def test_gif_with_comments_after_its_only_frame_is_not_animated() -> None:
    comment = b"!\xfe\5hello\0"
    data = SEEDS["gif"][:-1] + comment * 3 + b";"
    assert header.read(data) == ImageHeader("GIF", WIDTH, HEIGHT)


def test_gif_of_very_many_blocks_is_taken_as_animated() -> None:
    frame = b"," + struct.pack("<4HBB", 0, 0, 5, 5, 0, 8)
    assert header.read(b"GIF89a\5\0\5\0\0\0\0" + frame + b"\1;" * 5000 + b"\0;").animated


def test_gif_extension_with_an_empty_first_block_is_skipped() -> None:
    start = 13 + (3 << (SEEDS["gif"][10] & 7) + 1)
    for label, blocks in ((1, b"\0\4,abc\0"), (0xFE, b"\0")):
        data = SEEDS["gif"][:start] + bytes([0x21, label]) + blocks + SEEDS["gif"][start:]
        assert header.read(data).size == decoded_size(data) == SIZE


@pytest.mark.parametrize("length", [12, 40, 52, 56, 64, 108, 124])
def test_every_bmp_header_is_read(length: int) -> None:
    if length == 12:
        fields = struct.pack("<IHHHH", 12, 5, 7, 1, 24)
    else:
        fields = struct.pack("<IiiHH", length, 5, -7, 1, 24).ljust(length, b"\0")
    data = b"BM" + struct.pack("<8xI", 14 + length) + fields + bytes(16 * 7)
    assert header.read(data) == ImageHeader("BMP", 5, 7)
    assert decoded_size(data) == (5, 7)


def test_tiff_whose_page_links_to_itself_is_not_animated() -> None:
    data = bytearray(SEEDS["tiff"])
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    for following, animated in ((0, False), (first, False), (first + 1, True)):
        struct.pack_into("<I", data, first + 2 + 12 * entries, following)
        assert header.read(bytes(data)) == ImageHeader("TIFF", WIDTH, HEIGHT, animated=animated)
        assert Image.open(io.BytesIO(data)).is_animated == animated


TURNS = [irot(0), irot(1), irot(2), irot(3), imir(0), imir(1)]


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_turns_of_heif_and_avif_are_the_orientation(kind: str) -> None:
    """Applying the orientation to the stored pixels gives the decoder's picture."""
    plain = encode(picture(), kind)
    stored = _decoded(plain)
    for first, second in itertools.product(TURNS, TURNS):
        data = with_properties(plain, first, second)
        found = header.read(data)
        assert (found.format, found.width, found.height) == (kind, WIDTH, HEIGHT)
        tagged = stored.copy()
        tagged.getexif()[ORIENTATION] = found.orientation
        expected = np.asarray(ImageOps.exif_transpose(tagged), np.float32)
        shown = np.asarray(_decoded(data), np.float32)
        assert found.size == shown.shape[1::-1]
        assert np.abs(expected - shown).mean() < 5  # else > 20


def _decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("HEIF", "AVIF"))
    image.load()
    upright = ImageOps.exif_transpose(image) if image.format == "AVIF" else image
    return Image.fromarray(np.asarray(upright))


@pytest.mark.parametrize(
    "properties",
    [
        [clap(100, 50)],
        [clap(51, 33, (1, 2), (1, 2))],
        [clap(51, 32, (-7, 3), (5, 7))],
        [clap(50, 33, (11, 1), (-3, 1))],
        [clap(128, 64)],
        [clap(40, 40, (121, 2), (41, 2))],
        [clap(200, 50)],  # wider than the picture
        [clap(100, 50, (30, 1))],  # beyond its right edge
        [clap(100, 50, (0, 1), (-20, 1))],
        [clap(100, 50), irot(1)],
        [irot(1), clap(50, 100)],
        [irot(1), clap(100, 50)],
        [irot(3), clap(40, 100), imir(0), irot(2)],
        [clap(100, 50), clap(80, 40, (1, 2))],
    ],
)
def test_crops_of_heif_are_applied(properties: list[bytes]) -> None:
    data = with_properties(encode(picture(size=(128, 64)), "HEIF"), *properties)
    assert header.read(data).size == decoded_size(data) is not None


def test_crops_of_avif_are_not_applied() -> None:
    data = with_properties(SEEDS["avif"], clap(20, 10), irot(1))
    assert header.read(data) == ImageHeader("AVIF", WIDTH, HEIGHT, 8)
    assert decoded_size(data) == SIZE[::-1]


def test_avif_metadata_of_another_item_is_ignored() -> None:
    data = SEEDS["avif xmp"].replace(b"cdsc", b"thmb")
    assert header.read(data) == ImageHeader("AVIF", WIDTH, HEIGHT)
    assert decoded_size(data) == SIZE


LARGE_BOX = struct.pack(">I4sQ", 1, b"free", 16 + 7) + b"skipped"


def _heif(number: int, ipma: bytes, *, brand: bytes = b"heic", version: int = 0) -> bytes:
    """Only the boxes that determine the size; properties are 64x48 and 320x240."""
    form = ">I" if version else ">H"
    sizes = b"".join(
        box(b"ispe", bytes(4) + struct.pack(">II", *size)) for size in ((64, 48), (320, 240))
    )
    pitm = box(b"pitm", bytes([version, 0, 0, 0]) + struct.pack(form, number))
    meta = box(b"meta", bytes(4) + pitm + box(b"iprp", box(b"ipco", sizes) + ipma))
    return box(b"ftyp", brand + b"\0\0\0\0mif1") + LARGE_BOX + meta


@pytest.mark.parametrize(
    ("version", "flags", "entry"),
    [
        (0, 0, ">HBB"),
        (0, 1, ">HBH"),
        (1, 0, ">IBB"),
        (1, 1, ">IBH"),
    ],
)
def test_the_size_of_heif_is_that_of_the_primary_item(version: int, flags: int, entry: str) -> None:
    items = struct.pack(entry, 1, 1, 1) + struct.pack(entry, 7, 1, 2)
    ipma = box(b"ipma", bytes([version, 0, 0, flags]) + struct.pack(">I", 2) + items)
    for number, size in ((1, (64, 48)), (7, (320, 240))):
        assert header.read(_heif(number, ipma, version=version)).size == size
    with pytest.raises(InvalidImage, match="0 sizes"):
        header.read(_heif(5, ipma, version=version))


# Refused files.


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(size=(64, 64)), "ICO"),
        encode(picture(), "JPEG2000"),
        encode(picture(), "EPS"),
        encode(picture(), "PDF"),
        encode(picture(), "PPM"),
        encode(picture(), "TGA"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!doctype html><html></html>",
        b"8BPS\0\1" + bytes(20),
        b"\xff\x0a" + bytes(20),  # JPEG XL
        b"RIFF\0\0\0\0WAVEfmt " + bytes(20),
        box(b"ftyp", b"mp42\0\0\0\0isom"),
        box(b"ftyp", b"crx \0\0\0\1crx isom"),
        b"\xff\xd8",
        b"\x89PN",
        b"B",
        b" " + SEEDS["png"],
        b"\n" + SEEDS["gif"],
        b"\xef\xbb\xbf" + SEEDS["jpeg"],
    ],
    ids=lambda data: repr(data[:8]),  # the files are not the same in every process
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedImageFormat, match="JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC"):
        header.read(data)


def _png(width: int, height: int) -> bytes:
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr


IDAT = chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\xff\xd8" + _frame(0xC0, (37, 0)) + SCAN, "37x0 pixels"),  # the height would be in DNL
        (b"\xff\xd8" + _frame(0xC0) * 2 + SCAN, "2 frame headers"),
        (b"\xff\xd8" + SCAN, "0 frame headers"),
        (b"\xff\xd8" + segment(0xC0, b"\x08") + SCAN, "0 frame headers"),
        (b"\xff\xd8" + _frame(0xC5) + SCAN, "not supported"),
        (b"\xff\xd8" + _frame(0xC0), "truncated"),
        (b"\xff\xd8\xff\x01" + _frame(0xC0), "unknown marker"),
        (b"\xff\xd8\xff\xd9" + bytes(5000) + _frame(0xC0) + SCAN, "marker is missing"),
        (_png(0, 5) + IDAT, "0x5 pixels"),
        (_png(5, 5), "no image data"),
        (_png(5, 5) + _png(6, 6)[8:] + IDAT, "several headers"),
        (_png(5, 5)[:8] + IDAT + _png(5, 5)[8:], "begin with its header"),
        (SEEDS["webp"][:-1], "truncated"),
        (SEEDS["webp"].replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b"), "begin with a frame"),
        (SEEDS["webp exif"].replace(b"EXIF", b"EXIF\xff\xff"), "cut short"),
        (b"GIF89a" + bytes(7) + b";", "no frame"),
        (b"GIF89a\5\0\5\0\0\0\0!\xfe" + b"\1a" * 5000, "too many blocks"),
        (b"BM" + struct.pack("<12xI", 16) + bytes(99), "header has 16 bytes"),
        (SEEDS["bmp"][:40], "truncated"),
        (b"II*\0\x08\0\0\0\0\0", "no width"),
        (b"II*\0\x08\0", "truncated"),
        (SEEDS["tiff"].replace(struct.pack("<HHI", 256, 4, 1), bytes(8)), "no width"),
        (box(b"ftyp", b"heic\0\0\0\0mif1"), "'meta'"),
        (box(b"ftyp", b"avis\0\0\0\0avif"), "'moov'"),
        (with_properties(SEEDS["heif"], clap(0, 0)), "0x0 pixels"),
        (with_properties(SEEDS["heif"], clap(9, 9, (1, 0))), "divides by zero"),
        (_heif(1, box(b"ipma", struct.pack(">IIHBB", 0, 1, 1, 1, 9))), "does not exist"),
        (_heif(1, box(b"ipma", struct.pack(">IIHBBB", 0, 1, 1, 2, 1, 2))), "2 sizes"),
        (_heif(1, b"\0\0\xff\xffipma"), "reaches beyond"),
    ],
)
def test_damaged_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        header.read(data)
    assert decoded_size(data) is None


def test_heif_without_a_size_is_refused_though_libheif_finds_one() -> None:
    data = SEEDS["heif"].replace(b"ispe", b"skip")
    with pytest.raises(InvalidImage, match="0 sizes"):
        header.read(data)
    assert decoded_size(data) == SIZE


@pytest.mark.parametrize("name", SEEDS)
def test_truncated_files_are_refused_or_give_the_whole_files_size(name: str) -> None:
    whole = header.read(SEEDS[name])
    for end in range(len(SEEDS[name])):
        try:
            found = header.read(SEEDS[name][:end])
        except ClientError:
            continue
        assert found.format == whole.format
        assert sorted(found.size) == sorted(whole.size)


# Random and damaged files.

MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\0\0\0WEBPVP8X", b"GIF89a", b"BM")
MORE_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypavis")


@settings(max_examples=500)
@given(st.sampled_from([b"", *MAGIC, *MORE_MAGIC]), st.binary(max_size=400))
@example(b"", b"")
def test_random_bytes_give_a_client_error_or_the_decoded_size(magic: bytes, rest: bytes) -> None:
    found = header_size(magic + rest)
    assert found is None or decoded_size(magic + rest) in (None, found)


def damaged(random: Random) -> bytes:
    """A seed with up to four changes, mostly in its first bytes."""
    data = bytearray(random.choice(list(SEEDS.values())))
    for _ in range(random.randint(1, 4)):
        last = max(0, len(data) - 1)
        at = random.randint(0, random.choice((min(last, 400), last)))
        replaced = random.choice((0, 1, 2, 4, 12))
        given = random.randbytes(random.choice((replaced, random.randint(0, 12))))
        numbers = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\1", bytes(data[at : at + 12]))
        data[at : at + replaced] = random.choice((given, given, random.choice(numbers)))
    if data.startswith(b"\x89PNG") and random.random() < 0.5:
        return with_checksums(bytes(data))
    return bytes(data)


def test_damaged_files_give_a_client_error_or_the_decoded_size() -> None:
    random = Random(1)
    read = 0
    for _ in range(1200):
        data = damaged(random)
        found = header_size(data)
        read += found is not None
        assert found is None or decoded_size(data) in (None, found), data.hex()
    assert 300 < read < 1100


# Bounds.

# Lines of the reader that it may execute, a few for each of at most 4096 chunks of a PNG; and what
# it may allocate: eight segments of EXIF, twice while they are joined.
MAX_LINES = 100_000
MAX_ALLOCATED_BYTES = 2 << 20


def hostile(nbytes: int) -> Iterator[tuple[str, bytes]]:
    """Files of about `nbytes` that cause as much work as possible."""
    ends = {"end": chunk(b"IDAT", b"0"), "scan": _frame(0xC0) + SCAN}
    entries = [struct.pack("<HHII", tag, 3, 4, 0) for tag in range(60_000)]
    directory = struct.pack("<IH", 8, 60_000) + b"".join(entries)
    key = b"XML:com.adobe.xmp\0"
    bomb = zlib.compress(b"tiff:Orientation" * (nbytes // 16))
    yield "png chunks", _png(9, 9) + IDAT * (nbytes // 12)
    yield "png texts", _png(9, 9) + chunk(b"tEXt", b"a" * 8) * (nbytes // 20) + ends["end"]
    yield "png xmp", _png(9, 9) + chunk(b"iTXt", key + b"\0\0\0\0" + b"<" * nbytes) + ends["end"]
    yield "png bomb", _png(9, 9) + chunk(b"iTXt", key + b"\1\0\0\0" + bomb) + ends["end"]
    yield "jpeg fill", b"\xff\xd8" + b"\xff" * nbytes
    yield "jpeg junk", b"\xff\xd8\xff\xd9" + (bytes(4000) + b"\xff\xd9") * (nbytes // 4000)
    large = exif(None)[:14] + b"\xff\xff" + entries[0] * 5400
    yield "jpeg exif", b"\xff\xd8" + segment(0xE1, large) * (nbytes // len(large)) + ends["scan"]
    yield "gif blocks", SEEDS["gif"][:10] + b"\0\0\0!\xfe" + b"\1a" * (nbytes // 2)
    frame = b"," + struct.pack("<4HBB", 0, 0, 9, 9, 0, 8)
    yield "gif frame", SEEDS["gif"][:10] + b"\0\0\0" + frame + b"\1a" * (nbytes // 2)
    yield "gif full blocks", SEEDS["gif"][:10] + b"\0\0\0" + frame + b"\xff" * nbytes
    frames = b"ANMF\0\0\0\0" * (nbytes // 8)
    vp8x = b"VP8X\x0a\0\0\0\x0e\0\0\0" + bytes(6)
    yield "webp", b"RIFF" + struct.pack("<I", 22 + len(frames)) + b"WEBP" + vp8x + frames
    yield "tiff", b"II*\0" + directory + bytes(nbytes)
    yield "heif boxes", box(b"ftyp", b"heic") + box(b"free", b"") * (nbytes // 8)
    others = struct.pack(">HBB", 5, 1, 1) * 60_000
    ipma = box(b"ipma", struct.pack(">II", 0, 60_000) + others)
    yield "heif items", _heif(1, ipma * (nbytes // len(ipma)))
    own = struct.pack(">HBB", 1, 1, 1)
    avif = _heif(1, box(b"ipma", struct.pack(">II", 0, 1) + own), brand=b"avif")
    infe = box(b"infe", b"\2\0\0\0" + struct.pack(">HH", 7, 0) + b"mime\0application/rdf+xml\0")
    cdsc = box(b"cdsc", struct.pack(">HHH", 7, 1, 1))
    lists = (
        box(b"iinf", struct.pack(">IH", 0, 60_000) + infe * (nbytes // len(infe)))
        + box(b"iref", bytes(4) + cdsc * (nbytes // len(cdsc)))
        + box(b"iloc", struct.pack(">IHH", 0, 0x4400, 60_000) + bytes(nbytes))
    )
    at = avif.index(b"meta") - 4
    (size,) = struct.unpack_from(">I", avif, at)
    yield "avif", avif[:at] + struct.pack(">I", size + len(lists)) + avif[at + 4 :] + lists


def _read(data: bytes) -> None:
    with contextlib.suppress(ClientError):
        header.read(data)


def _lines(data: bytes) -> int:
    """How many lines of the reader are executed for `data`."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if "server/imaging/header" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        _read(data)
    finally:
        sys.settrace(before)
    return count


def test_hostile_files_take_bounded_steps_and_memory() -> None:
    for name, data in hostile(4 << 20):
        assert 0 < _lines(data) <= MAX_LINES, name
        tracemalloc.start()
        try:
            _read(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= MAX_ALLOCATED_BYTES, name

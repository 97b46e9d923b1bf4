"""Truncated, damaged and hostile files are refused with a clear error, and never decoded."""

import contextlib
import io
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.errors import ImageTooLarge, InvalidImage, SaccadeError, UnsupportedImageFormat
from server.imaging.decode import DecodeOptions, decode, frame_count
from tests import encoded, pictures

PHOTO = pictures.photo((121, 83), 2)
FILES = encoded.files(PHOTO)


def _cuts(size: int) -> Iterator[int]:
    """Lengths to truncate a file to: spread over the file, and every length near both ends."""
    yield from range(1, min(size, 100))
    yield from range(100, size, max(1, size // 60))
    yield from range(max(1, size - 30), size)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
def test_a_truncated_file_is_always_refused(name: str) -> None:
    data = FILES[name]
    decode(data, DecodeOptions())
    for size in sorted(set(_cuts(len(data)))):
        with pytest.raises((InvalidImage, UnsupportedImageFormat)):
            decode(data[:size], DecodeOptions())


@pytest.mark.parametrize(
    ("name", "kept"),
    [("png", 900), ("jpeg", 3000), ("webp", 900), ("gif", 900), ("tiff", 9000), ("bmp", 9000)],
)
def test_the_error_for_a_truncated_file_says_truncated(name: str, kept: int) -> None:
    with pytest.raises(InvalidImage, match=r"truncated$"):
        decode(FILES[name][:kept], DecodeOptions())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_decode_or_raise_our_errors(name: str) -> None:
    """No exception of a library escapes, whatever the bytes are."""
    chance = random.Random(name)
    for _ in range(60):
        data = bytearray(FILES[name])
        for _ in range(chance.choice((1, 4, 20))):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
            data[chance.randrange(len(data))] = chance.randrange(256)
        for read in (
            lambda: decode(bytes(data), DecodeOptions(max_pixels=1_000_000)),  # noqa: B023
            lambda: frame_count(bytes(data)),  # noqa: B023
        ):
            message = _refusal(read)
            assert message is None or re.fullmatch(r"(the|frame|TIFF) [\w ',:/()=-]+", message)


def _refusal(read: Callable[[], Any]) -> str | None:
    try:
        read()
    except SaccadeError as error:
        return error.message
    return None


# ------------------------------------------------------------------ JPEG


def _damaged(data: bytes, at: float, how: str, seed: int) -> bytes:
    """`data` with typical disk or network damage at a fraction of its length."""
    chance = random.Random(seed)
    place = int(len(data) * at)
    if how == "sector of zeros":
        return data[:place] + bytes(512) + data[place + 512 :]
    if how == "sector of another file":
        return data[:place] + chance.randbytes(512) + data[place + 512 :]
    if how == "sector lost":
        return data[:place] + data[place + 512 :]
    assert how == "sector twice"
    return data[: place + 512] + data[place:]


LARGER = pictures.photo((640, 480), 3)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    "how", ["sector of zeros", "sector of another file", "sector lost", "sector twice"]
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 40}])
def test_a_jpeg_damaged_midway_is_refused(options: dict[str, object], how: str, at: float) -> None:
    data = pictures.encode(LARGER, "JPEG", quality=85, **options)
    Image.open(io.BytesIO(data)).load()
    files = [_damaged(data, at + seed / 200, how, seed) for seed in range(10)]
    refusals = [_refusal(lambda: decode(file, DecodeOptions())) for file in files]  # noqa: B023
    refused = sum(message is not None for message in refusals)
    # In a progressive file zeros can be valid, and lost bytes do not change the number of blocks.
    assert refused >= (4 if options.get("progressive") else 9)


def test_flipped_bits_that_desynchronise_the_codes_are_refused() -> None:
    data = pictures.encode(LARGER, "JPEG", quality=85)
    chance = random.Random(1)
    refused = 0
    for _ in range(200):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data) // 4, len(data) - 100)] ^= 1 << chance.randrange(8)
        try:
            decode(bytes(flipped), DecodeOptions())
        except InvalidImage:
            refused += 1
    # Most flipped bits change a value but keep the codes in step, which is undetectable.
    assert refused >= 20


def test_damage_is_detected_in_a_reduced_jpeg_too() -> None:
    data = pictures.encode(LARGER, "JPEG", quality=85)
    damaged = _damaged(data, 0.5, "sector lost", 0)
    with pytest.raises(InvalidImage):
        decode(damaged, DecodeOptions(), lambda width, height: (100, 75))


def test_padding_between_jpeg_segments_is_accepted() -> None:
    data = pictures.encode(LARGER, "JPEG", quality=85)
    whole = np.asarray(decode(data, DecodeOptions()).image)
    tables = data.index(b"\xff\xdb")
    for harmless in (
        data[:-2] + bytes(3) + data[-2:],  # padding before the end
        data[:tables] + bytes(7) + data[tables:],  # and before the tables
        data + b"appended by a program",
        data.replace(b"JFIF\0\1\1", b"JFIF\0\7\1", 1),  # a future version
        data + bytes(5000),
    ):
        assert np.array_equal(np.asarray(decode(harmless, DecodeOptions()).image), whole)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
def test_zeros_in_the_data_of_a_flat_jpeg_are_accepted(options: dict[str, object]) -> None:
    flat = Image.new("RGB", (1200, 900), "white")
    flat.paste(PHOTO, (600, 400))
    data = pictures.encode(flat, "JPEG", **options)
    assert decode(data, DecodeOptions()).image.getpixel((5, 5)) == (255, 255, 255)


def test_zeros_in_metadata_and_after_the_end_are_accepted() -> None:
    exif = Image.Exif()
    exif[0x927C] = bytes(500)
    thumbnail = pictures.encode(PHOTO.resize((20, 20)), "JPEG")
    exif[0x9286] = thumbnail
    data = pictures.encode(LARGER, "JPEG", exif=exif)
    assert bytes(32) in data
    assert decode(data + bytes(500), DecodeOptions()).size == LARGER.size


def test_a_jpeg_with_more_scans_than_encoders_make_is_refused() -> None:
    data = pictures.encode(PHOTO, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(InvalidImage, match="500 scans"):
        decode(data[:last] + data[last:-2] * 600 + data[-2:], DecodeOptions())


# ------------------------------------------------------------------ PNG


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _header(width: int, height: int, *more: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *(more or (8, 0, 0, 0, 0))))


ROWS = zlib.compress(bytes(11 * 10))


def test_a_wrong_checksum_is_refused() -> None:
    good = _png(_header(10, 10), _chunk(b"IDAT", ROWS))
    assert decode(good, DecodeOptions()).size == (10, 10)
    at = good.index(ROWS) + len(ROWS)
    with pytest.raises(InvalidImage, match="checksum"):
        decode(good[:at] + b"\0\0\0\0" + good[at + 4 :], DecodeOptions())


@pytest.mark.parametrize(
    "data",
    [
        _png(_chunk(b"IDAT", ROWS)),
        _png(_header(10, 10)),
        _png(_header(10, 11), _chunk(b"IDAT", ROWS)),
        _png(_header(10, 10), _chunk(b"IDAT", ROWS[:-1])),
        _png(_header(10, 10), _chunk(b"IDAT", ROWS[:-4] + bytes(4))),
        _png(_header(10, 10), _chunk(b"IDAT", zlib.compress(b"\7" + bytes(109)))),
        _png(_header(10, 10, 8, 3, 0, 0, 0), _chunk(b"IDAT", ROWS)),
        _png(_header(0, 10), _chunk(b"IDAT", ROWS)),
        _png(_header(10, 10, 5, 0, 0, 0, 0), _chunk(b"IDAT", ROWS)),
        _png(_header(10, 10, 8, 0, 1, 0, 0), _chunk(b"IDAT", ROWS)),
    ],
)
def test_contradictory_png_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        decode(data, DecodeOptions())


def test_surplus_image_data_in_a_png_is_ignored() -> None:
    data = _png(_header(10, 10), _chunk(b"IDAT", zlib.compress(bytes(110) + b"surplus")))
    assert decode(data, DecodeOptions()).size == (10, 10)


@pytest.mark.parametrize(
    "chunk",
    [
        _chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(200_000_000), 1)),
        _chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(200_000_000), 1)),
        _chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(200_000_000), 1)),
    ],
    ids=["iCCP", "zTXt", "iTXt"],
)
def test_metadata_bombs_are_not_decompressed(chunk: bytes) -> None:
    before = _peak_kib()
    data = _png(_header(10, 10), chunk, _chunk(b"IDAT", ROWS))
    with contextlib.suppress(InvalidImage):
        decode(data, DecodeOptions())
    assert _peak_kib() - before < 100_000


def test_a_png_with_too_many_chunks_is_refused() -> None:
    with pytest.raises(InvalidImage, match="no image data"):
        decode(_png(_header(10, 10), _chunk(b"tESt", b"") * 200_000), DecodeOptions())


def _peak_kib() -> int:
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+)", status.read())[1])  # type: ignore[index]


# ------------------------------------------------------------------ TIFF, GIF


def _tiff(tags: dict[int, int], body: bytes) -> bytes:
    """A TIFF file of one page; `body` is at offset 8."""
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def test_tiles_far_larger_than_the_picture_are_refused() -> None:
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 324: 8, 325: 256}
    small = _tiff(tags | {322: 16, 323: 16}, bytes(256))
    assert decode(small, DecodeOptions()).size == (16, 16)
    with pytest.raises(InvalidImage, match="tiles of 65536x65536"):
        decode(_tiff(tags | {322: 65_536, 323: 65_536}, bytes(256)), DecodeOptions())


def test_strips_far_larger_than_the_picture_are_not_allocated() -> None:
    packed = zlib.compress(bytes(256))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 273: 8, 279: len(packed)}
    before = _peak_kib()
    data = _tiff(tags | {278: 0xFFFFFFFF}, packed)
    assert decode(data, DecodeOptions()).size == (16, 16)
    assert _peak_kib() - before < 10_000


def test_a_tiff_directory_that_points_to_itself_is_one_page() -> None:
    data = bytearray(pictures.encode(PHOTO, "TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    struct.pack_into("<I", data, directory + 2 + 12 * entries, directory)
    assert frame_count(bytes(data)) == 1


def test_gif_frames_beyond_the_screen_enlarge_the_size() -> None:
    data = bytearray(pictures.encode(Image.new("P", (10, 10)), "GIF"))
    frame = data.rindex(b"\x2c\0\0\0\0\x0a\0\x0a\0")
    struct.pack_into("<HH", data, frame + 5, 60_000, 60_000)
    with pytest.raises(ImageTooLarge, match="60000x60000"):
        decode(bytes(data), DecodeOptions())


def test_later_gif_frames_beyond_the_screen_enlarge_the_size() -> None:
    photo = PHOTO.quantize(16)
    data = bytearray(
        pictures.encode(photo, "GIF", save_all=True, append_images=[PHOTO.rotate(180).quantize(9)])
    )
    frame = data.rindex(b"\x2c\0\0\0\0\x79\0\x53\0")
    struct.pack_into("<HH", data, frame + 5, 60_000, 60_000)
    assert decode(bytes(data), DecodeOptions()).size == PHOTO.size
    with pytest.raises(ImageTooLarge):
        decode(bytes(data), DecodeOptions(frame=1))

"""Reduced JPEG decoding: like a resized full decode, in libjpeg's sizes; None for other files."""

import functools
import io
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from benchmarks import photos
from server.imaging.codecs import jpeg_reduced
from server.imaging.codecs.jpeg_reduced import SCALES, decode
from tests import pictures

PHOTO = pictures.photo((160, 120), 1)
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
SIZES = ((1, 1), (7, 9), (17, 3), (8, 8), (16, 16), (33, 65), (250, 31))
# Offset of the first byte after the signature and JFIF's version and density.
AFTER_JFIF = 20

Pixels = npt.NDArray[np.uint8]


def _jpeg(image: Image.Image = PHOTO, **options: object) -> bytes:
    return pictures.encode(image, "JPEG", **({"quality": 90} | options))


def _likeness(ours: Image.Image, theirs: Image.Image) -> float:
    """PSNR in dB."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


def _libjpegs(data: bytes, scale: int) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    return image


def _decoded(data: bytes, scale: int) -> Pixels:
    pixels = decode(data, scale)
    assert pixels is not None
    return pixels


# ---------------------------------------------------------------------- files that are decoded


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_reduced_photos_are_as_accurate_as_libjpegs(sampling: str, scale: int) -> None:
    data = _jpeg(_drawn(), subsampling=sampling)
    wanted = (int(1920 / scale * 0.8), int(1440 / scale * 0.8))
    whole = Image.open(io.BytesIO(data)).resize(wanted, Image.Resampling.BICUBIC)
    ours, theirs = (
        _likeness(image.resize(wanted, Image.Resampling.BICUBIC), whole)
        for image in (Image.fromarray(_decoded(data, scale)), _libjpegs(data, scale))
    )
    assert ours > 40
    assert ours > theirs - 0.5


@functools.cache
def _drawn() -> Image.Image:
    return Image.open(io.BytesIO(photos.photo(1920, 1440, 3, quality=98)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_reduced_coloured_text_is_nearly_as_sharp_as_libjpegs(sampling: str, scale: int) -> None:
    data = _jpeg(_coloured_text(), subsampling=sampling)
    wanted = (1200 // scale * 4 // 5, 900 // scale * 4 // 5)
    whole = Image.open(io.BytesIO(data)).resize(wanted, Image.Resampling.BICUBIC)
    ours, theirs = (
        _likeness(image.resize(wanted, Image.Resampling.BICUBIC), whole)
        for image in (Image.fromarray(_decoded(data, scale)), _libjpegs(data, scale))
    )
    assert ours > theirs - 1.5


@functools.cache
def _coloured_text() -> Image.Image:
    random = np.random.default_rng(0)
    image = Image.new("RGB", (1200, 900), "white")
    draw = ImageDraw.Draw(image)
    for size in random.integers(24, 80, 60):
        left, top = random.integers(0, (1100, 850)).tolist()
        ground, ink = ("#" + random.bytes(3).hex() for _ in range(2))
        draw.rectangle((left, top, left + 4 * size, top + size), fill=ground)
        draw.text((left, top), "total 12,345", fill=ink, font=ImageFont.load_default(int(size)))
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "L"])
def test_reduced_sizes_are_libjpegs(size: tuple[int, int], sampling: str) -> None:
    image = pictures.photo((250, 250), 2).crop((0, 0, *size))
    data = _jpeg(image.convert("L")) if sampling == "L" else _jpeg(image, subsampling=sampling)
    whole = Image.open(io.BytesIO(data))
    for scale in SCALES:
        pixels = _decoded(data, scale)
        reduced = np.asarray(whole.reduce(scale), np.float32)
        assert pixels.shape == reduced.shape
        assert np.abs(pixels - reduced).mean() < 16  # a different picture differs by more than 40
        if min(size) >= scale:
            assert _libjpegs(data, scale).size == pixels.shape[1::-1]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"restart_marker_blocks": 1},
        {"restart_marker_blocks": 7},
        {"restart_marker_rows": 1},
        {"optimize": True},
        {"exif": b"Exif\0\0" + bytes(3000)},
        {"comment": b"\xff\xd9" * 100},
        {"icc_profile": bytes(100_000)},
    ],
    ids=str,
)
def test_every_encoding_of_the_same_coefficients_gives_the_same_pixels(
    options: dict[str, object], sampling: str, scale: int
) -> None:
    plain = _decoded(_jpeg(subsampling=sampling), scale)
    assert np.array_equal(_decoded(_jpeg(subsampling=sampling, **options), scale), plain)


def test_every_block_of_noise_decodes_to_its_mean() -> None:
    """Noise has long codes, and blocks that end with their last coefficient."""
    noise = np.random.default_rng(0).integers(60, 196, (256, 256), dtype=np.uint8)
    data = _jpeg(Image.fromarray(noise), quality=100)
    means = noise.reshape(32, 8, 32, 8).mean(axis=(1, 3))
    assert np.abs(_decoded(data, 8) - means).max() < 2
    quarters = noise.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.corrcoef(_decoded(data, 4).ravel(), quarters.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("scale", SCALES)
def test_luma_with_more_samples_vertically_than_horizontally_is_decoded(scale: int) -> None:
    data = bytearray(_jpeg(PHOTO.resize((120, 120)), subsampling="4:2:2"))
    sampling = data.index(b"\xff\xc0") + 11
    assert data[sampling] == 0x21
    data[sampling] = 0x12  # the same number of blocks, in different positions
    whole = Image.open(io.BytesIO(bytes(data)))
    pixels = _decoded(bytes(data), scale)
    assert np.abs(pixels - np.asarray(whole.reduce(scale), np.float32)).mean() < 4  # libjpeg: 5


def test_the_shortest_possible_tables_are_accepted() -> None:
    grey = _two_blocks(b"\x01" + bytes(16), bytes(1))  # "end of block" is a zero bit as well
    assert np.array_equal(_decoded(grey, 8), [[128, 128]])


def test_grey_jpeg_with_any_sampling_factors_is_decoded() -> None:
    data = bytearray(_jpeg(PHOTO.convert("L")))
    plain = _decoded(bytes(data), 4)
    data[data.index(b"\xff\xc0") + 11] = 0x22
    assert np.array_equal(_decoded(bytes(data), 4), plain)
    assert np.abs(plain - np.asarray(_libjpegs(bytes(data), 4), np.float32)).mean() < 4
    data[data.index(b"\xff\xc0") + 11] = 0x20
    assert decode(bytes(data), 4) is None


def test_a_redundant_adobe_marker_is_accepted() -> None:
    assert np.array_equal(_decoded(_with_adobe_transform(1), 4), _decoded(_jpeg(), 4))


def test_data_after_the_end_of_image_is_ignored() -> None:
    assert np.array_equal(_decoded(_jpeg() + _jpeg(), 4), _decoded(_jpeg(), 4))


# ---------------------------------------------------------------------- files left to libjpeg


def _patched(marker: bytes, offset: int, value: int) -> bytes:
    data = bytearray(_jpeg())
    data[data.index(marker) + offset] = value
    return bytes(data)


def _others() -> dict[str, bytes]:
    grey, cmyk = PHOTO.convert("L"), PHOTO.convert("CMYK")
    restarts = _jpeg(restart_marker_blocks=10)
    return {
        "nothing": b"",
        "a signature": b"\xff\xd8",
        "png": pictures.encode(grey),
        "progressive": _jpeg(progressive=True),
        "cmyk": _jpeg(cmyk),
        "rgb": _jpeg(keep_rgb=True),
        "rgb for Adobe": _with_adobe_transform(0),
        "arithmetic coding": _patched(b"\xff\xc0", 1, 0xC9),
        "12 bits": _patched(b"\xff\xc0", 4, 12),
        "height said later": _patched(b"\xff\xc0", 6, 0),
        "no width": _patched(b"\xff\xc0", 8, 0),
        "65535 rows": _patched(b"\xff\xc0", 5, 0xFF),
        "odd sampling": _patched(b"\xff\xc0", 11, 0x41),
        "a scan of one component": _patched(b"\xff\xda", 4, 1),
        "part of the coefficients": _patched(b"\xff\xda", 12, 5),
        "a table of its own": _patched(b"\xff\xda", 6, 0x33),
        "no quantiser": _patched(b"\xff\xc0", 12, 3),
        "no tables": _jpeg().replace(b"\xff\xc4", b"\xff\xfe"),
        "no AC table for luma": _without_table(0x10),
        "no AC table for chroma": _without_table(0x11),
        "no DC table": _without_table(0x01),
        "no codes": _patched(b"\xff\xc4", 5, 3),
        "a code of ones": _two_blocks(b"\x02" + bytes(15) + b"\x00\xf0", bytes(1)),
        "a block of 65": _two_blocks(b"\x01" + bytes(15) + b"\xf0", bytes(2)),
        "a run of nothing": _two_blocks(b"\x01\x01" + bytes(14) + b"\x10\x00", b"\x22"),
        "no such code": _two_blocks(b"\x01" + bytes(16), b"\x1f"),
        "a restart interval of many digits": _with_segment(b"\xff\xdd", bytes([1]) * 3000),
        "a thousand empty tables": _with_segment(b"\xff\xc4", bytes(17 * 1000)),
        "a thousand quantisers": _with_segment(b"\xff\xdb", bytes(65 * 1000)),
        "two frames": _jpeg().replace(b"\xff\xc0", _frame_segment() + b"\xff\xc0"),
        "no end": _jpeg()[:-2],
        "another end": _jpeg()[:-2] + b"\xff\xd8",
        "more at the end": _jpeg()[:-2] + b"\x12\x34\x56\xff\xd9",
        "less at the end": _jpeg()[:-40] + b"\xff\xd9",
        "half of it": _jpeg()[: len(_jpeg()) // 2],
        "restarts in another order": restarts.replace(b"\xff\xd1", b"\xff\xd2"),
        "a restart too few": restarts.replace(b"\xff\xd1", b""),
        "restarts nobody announced": restarts.replace(b"\xff\xdd", b"\xff\xfe"),
    }


def _with_segment(marker: bytes, content: bytes) -> bytes:
    return _jpeg()[:2] + marker + (len(content) + 2).to_bytes(2) + content + _jpeg()[2:]


def _without_table(selector: int) -> bytes:
    """The table is defined, but as a second table of the other class."""
    found = re.search(b"\xff\xc4.." + bytes([selector]), _jpeg(), re.DOTALL)
    assert found
    data = bytearray(_jpeg())
    data[found.end() - 1] ^= 1
    return bytes(data)


def _with_adobe_transform(transform: int) -> bytes:
    return _with_segment(b"\xff\xee", b"Adobe\x00\x64" + bytes(4) + bytes([transform]))


def _two_blocks(ac_table: bytes, scan: bytes) -> bytes:
    """A grey picture of two blocks. The only DC code is a zero bit, for no difference."""
    header = _jpeg(Image.new("L", (16, 8)))
    header = header[: header.index(b"\xff\xc4")]
    for selector, table in ((0x00, b"\x01" + bytes(16)), (0x10, ac_table)):
        header += b"\xff\xc4" + (len(table) + 3).to_bytes(2) + bytes([selector]) + table
    return header + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + scan + b"\xff\xd9"


def _frame_segment() -> bytes:
    at = _jpeg().index(b"\xff\xc0")
    return _jpeg()[at : at + 19]


@pytest.mark.parametrize("name", _others())
@pytest.mark.parametrize("scale", SCALES)
def test_all_other_files_are_left_to_libjpeg(name: str, scale: int) -> None:
    assert decode(_others()[name], scale) is None


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 16])
def test_other_scales_are_left_to_libjpeg(scale: int) -> None:
    assert decode(_jpeg(), scale) is None


def test_a_truncated_file_is_never_decoded() -> None:
    data = _jpeg(PHOTO.resize((48, 40)))
    assert all(decode(data[:length], 4) is None for length in range(len(data)))


# ---------------------------------------------------------------------- damage


def _bases() -> list[bytes]:
    files = [
        _jpeg(subsampling=sampling, quality=quality, **options)
        for sampling in SAMPLINGS
        for quality in (60, 92)
        for options in ({}, {"restart_marker_blocks": 7}, {"optimize": True})
    ]
    return [*files, _jpeg(PHOTO.convert("L"))]


def _damaged(count: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """Files with a few bytes changed, inserted or removed; three in ten near the tables."""
    random = np.random.default_rng(seed)
    bases = _bases()
    for _ in range(count):
        data = bytearray(bases[random.integers(len(bases))])
        for _ in range(random.integers(1, 4)):
            end = 650 if random.random() < 0.3 else len(data)
            at = int(random.integers(AFTER_JFIF, end))
            match random.integers(5):
                case 0:
                    data[at] ^= 1 << random.integers(8)
                case 1:
                    data[at] = random.integers(256)
                case 2:
                    data[at] = 0xFF
                case 3:
                    del data[at : at + random.integers(1, 40)]
                case 4:
                    data[at:at] = random.bytes(random.integers(1, 20))
        yield bytes(data), int(random.choice(SCALES))


def _is_whole_for_libjpeg(data: bytes) -> bool:
    try:
        pyvips.Image.jpegload_buffer(data, fail_on="warning").avg()
    except pyvips.Error:
        return False
    return True


def test_damage_is_detected_where_libjpeg_detects_it() -> None:
    taken = 0
    for data, scale in _damaged(4000, 1):
        pixels = decode(data, scale)
        if pixels is not None:
            taken += 1
            assert _is_whole_for_libjpeg(data)
    assert 400 < taken < 2000  # most damage is detected; some only changes the picture


@given(scan=st.binary(max_size=600), interval=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_as_a_scan_decode_or_are_refused(scan: bytes, interval: int) -> None:
    data = _jpeg(PHOTO.resize((40, 40)), restart_marker_blocks=interval)
    header = data[: data.index(b"\xff\xda") + 14]
    for scale in SCALES:
        pixels = decode(header + scan + b"\xff\xd9", scale)
        assert pixels is None or pixels.shape == (40 // scale, 40 // scale, 3)


def _longest_scans() -> Iterator[bytes]:
    """Scans that end anywhere in an MCU of only the longest symbols, of 31 zero bits each."""
    header = _jpeg(PHOTO, subsampling="4:2:0")
    header = header[: header.index(b"\xff\xc4")]
    codes = bytes(15) + b"\x01\x0f"  # one code of 16 bits, for a value of 15 bits
    for selector in (0x00, 0x01, 0x10, 0x11):
        header += b"\xff\xc4\x00\x14" + bytes([selector]) + codes
    header += b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"
    mcu_bytes = 6 * 64 * 31 // 8
    for length in range(mcu_bytes - 20, mcu_bytes + 20):
        yield header + bytes(length) + b"\xff\xd9"
        yield header + bytes(9 * mcu_bytes + length) + b"\xff\xd9"


def test_a_scan_of_only_the_longest_symbols_is_refused() -> None:
    assert all(decode(data, scale) is None for data in _longest_scans() for scale in SCALES)


def _line(length: int) -> npt.NDArray[np.float32]:
    return np.zeros(length, np.float32)


def _bytes(length: int) -> Pixels:
    return np.zeros(length, np.uint8)


_SHORT = _line(3)
_BLOCK = np.zeros((10, 4), np.int16)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (jpeg_reduced._fill_grey, (_SHORT, np.zeros(4, np.uint8))),
        (jpeg_reduced._fill_rgb, (_SHORT, _SHORT, _SHORT[:2], np.zeros(9, np.uint8))),
        (jpeg_reduced._fill_line_of_few, (_BLOCK, np.zeros(5, np.float32), 2, _line(10))),
        (jpeg_reduced._fill_line_of_few, (_BLOCK, np.zeros(4, np.float32), 2, _line(8))),
        (jpeg_reduced._fill_line_of_few, (_BLOCK[:4], np.zeros(5, np.float32), 2, _line(8))),
        (jpeg_reduced._fill_line_of_few, (_BLOCK, np.zeros(5, np.float32), 9, _line(8))),
        (jpeg_reduced._fill_line_of_ten, (_BLOCK, np.zeros(10, np.float32), 2, _line(10))),
        (jpeg_reduced._fill_line_of_ten, (_BLOCK[:9], np.zeros(10, np.float32), 2, _line(8))),
        (jpeg_reduced._word, (np.zeros(8, np.uint8), np.uint64(1))),
        (jpeg_reduced._copy, (_bytes(8), np.uint64(7), _bytes(8), np.uint64(0), np.uint64(2))),
        (jpeg_reduced._copy, (_bytes(8), np.uint64(0), _bytes(8), np.uint64(7), np.uint64(2))),
        (jpeg_reduced._long_value, (np.uint64(1 << 63), np.zeros(9, np.uint16), 0)),
    ],
)
def test_an_index_out_of_bounds_raises_an_error_when_checked(
    function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    with pytest.raises(IndexError):
        function(*arguments)


def _decode_with_checked_bounds() -> None:
    """Runs in a separate process in which every index is checked."""
    assert numba.config.BOUNDSCHECK
    for data, scale in _damaged(1500, 2):
        decode(data, scale)
    for data in (*_others().values(), *_longest_scans()):
        decode(data, 4)
    for data in _bases():
        assert all(decode(data, scale) is not None for scale in SCALES)


def test_all_indices_are_in_bounds_for_damaged_files() -> None:
    # Separate from the server's cache, whose code has no bounds checks. Kept: compiling takes long.
    cache = Path(__file__).parents[2] / "build" / "numba-boundscheck"
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)}
    code = "from tests.unit import test_decode_jpeg_reduced as t; t._decode_with_checked_bounds()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | checked, check=True, timeout=800)


# ---------------------------------------------------------------------- environments


def test_the_self_test_agrees_with_libjpeg_on_this_machine() -> None:
    assert jpeg_reduced.agrees_with_libjpeg()


def test_the_decoder_runs_without_a_writable_cache() -> None:
    environ = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    environ.pop("NUMBA_CACHE_DIR", None)
    code = "from tests.unit import test_decode_jpeg_reduced as t; t._decode_a_line_without_cache()"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=800)


def _decode_a_line_without_cache() -> None:
    line = np.zeros(4, np.uint8)
    jpeg_reduced._fill_grey(np.zeros(4, np.float32), line)
    assert line.tolist() == [128] * 4
    assert jpeg_reduced._fill_grey.stats.cache_path is None  # type: ignore[attr-defined]


def test_the_self_test_detects_disagreement_with_libjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = [pictures.encode(PHOTO.rotate(180), "JPEG"), pictures.encode(PHOTO, "JPEG")]
    wrong = decode(turned[0], 4)
    monkeypatch.setattr(jpeg_reduced, "decode", lambda data, scale: wrong)
    assert not jpeg_reduced._is_alike(turned[1], 4)
    assert not jpeg_reduced.agrees_with_libjpeg()


def test_a_forked_child_decodes_the_same_pixels_as_its_parent() -> None:
    parents = _decoded(_jpeg(), 4)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert np.array_equal(pool.apply(decode, (_jpeg(), 4)), parents)

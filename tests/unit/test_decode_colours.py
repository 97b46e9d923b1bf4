"""The sRGB colour that a patch of each colour space, depth and profile decodes to."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.errors import UnsupportedImageFormat
from server.imaging.decode import DecodeOptions, decode
from server.imaging.profiles import change_of
from tests import encoded, pictures, profiles

SIZE = (48, 32)
RED, TEAL, GREY = (200, 40, 30), (20, 140, 150), (119, 119, 119)


def _shown(data: bytes, **options: Any) -> np.ndarray:
    """The decoded colour at the centre."""
    pixels = np.asarray(decode(data, DecodeOptions(**options)).image)
    assert pixels.shape[:2] == SIZE[::-1]
    return pixels[SIZE[1] // 2, SIZE[0] // 2].astype(int)


def _near(shown: np.ndarray, wanted: Any, tolerance: int) -> bool:
    return bool(np.abs(shown - np.array(wanted)).max() <= tolerance)


# ------------------------------------------------------------------ plain colours

# Tolerance for a flat patch: lossless, YCbCr rounding, lossy codec.
CODECS = [
    ("PNG", {}, 0),
    ("BMP", {}, 0),
    ("TIFF", {}, 0),
    ("TIFF", {"compression": "jpeg"}, 3),
    ("WEBP", {"lossless": True}, 0),
    ("WEBP", {"quality": 95}, 3),
    ("GIF", {}, 0),
    ("JPEG", {"quality": 98}, 2),
    ("JPEG", {"quality": 98, "progressive": True}, 2),
    ("JPEG", {"quality": 98, "keep_rgb": True}, 2),
    ("AVIF", {"quality": 95}, 3),
]


@pytest.mark.parametrize("colour", [RED, TEAL, GREY, (0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize(("kind", "options", "tolerance"), CODECS)
def test_a_patch_keeps_its_colour(
    kind: str, options: dict[str, Any], tolerance: int, colour: tuple[int, int, int]
) -> None:
    data = pictures.encode(Image.new("RGB", SIZE, colour), kind, **options)
    assert _near(_shown(data), colour, tolerance)


@pytest.mark.parametrize("colour", [RED, TEAL])
def test_a_patch_keeps_its_colour_in_heif(colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (64, 64), colour)
    pixels = np.asarray(decode(encoded.heif(image), DecodeOptions()).image)
    assert _near(pixels[32, 32].astype(int), colour, 4)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, "1") for kind in ("PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "AVIF")),
        *((kind, "L") for kind in ("PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "AVIF")),
        *((kind, "P") for kind in ("PNG", "TIFF", "WEBP", "GIF", "BMP", "AVIF")),
    ],
)
def test_a_grey_patch_keeps_its_colour(kind: str, mode: str) -> None:
    value = 255 if mode == "1" else 119
    image = Image.new("L", SIZE, value).convert(mode)
    assert _near(_shown(pictures.encode(image, kind)), (value,) * 3, 2)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_converted_to_rgb(kind: str) -> None:
    inks = Image.new("CMYK", SIZE, (255, 0, 0, 51))  # full cyan, 20 % black
    data = pictures.encode(inks, kind, **({"quality": 98} if kind == "JPEG" else {}))
    assert _near(_shown(data), (0, 204, 204), 3)


def test_lab_is_converted_to_srgb() -> None:
    lab = Image.merge("LAB", [Image.new("L", SIZE, value) for value in (138, 209, 198)])
    # L* 54, a* 81, b* 70 (Pillow adds 128) is the red of sRGB (255, 0, 0).
    assert _near(_shown(pictures.encode(lab, "TIFF")), (255, 0, 0), 6)


# ------------------------------------------------------------------ transparency


def _alpha_files() -> dict[str, bytes]:
    half = Image.new("RGBA", SIZE, (*RED, 51))
    few = Image.new("P", SIZE, 3)
    few.putpalette([0] * 9 + list(RED))
    entries = bytes((255, 255, 255, 51))
    return {
        "png": pictures.encode(half),
        "webp": pictures.encode(half, "WEBP", lossless=True, exact=True),
        "tiff": pictures.encode(half, "TIFF"),
        "avif": pictures.encode(half, "AVIF", quality=100),
        "png palette": pictures.encode(few, transparency=entries),
    }


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
@pytest.mark.parametrize("name", _alpha_files())
def test_transparent_colour_is_blended_with_the_background(
    name: str, background: tuple[int, int, int]
) -> None:
    wanted = np.array(RED) * 0.2 + np.array(background) * 0.8
    assert _near(_shown(_alpha_files()[name], background=background), wanted, 2)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0)])
def test_transparent_colour_in_heif_is_blended_with_the_background(
    background: tuple[int, int, int],
) -> None:
    data = encoded.heif(Image.new("RGBA", (64, 64), (*RED, 51)))
    pixels = np.asarray(decode(data, DecodeOptions(background=background)).image)
    wanted = np.array(RED) * 0.2 + np.array(background) * 0.8
    assert _near(pixels[32, 32].astype(int), wanted, 4)


@pytest.mark.parametrize(
    "data",
    [
        pictures.encode(Image.new("RGB", SIZE, RED), transparency=RED),
        pictures.encode(Image.new("L", SIZE, 7), transparency=7),
        pictures.encode(Image.new("1", SIZE, 1), transparency=1),
        pictures.encode(Image.new("LA", SIZE, (7, 0))),
        pictures.encode(Image.new("P", SIZE, 1), "GIF", transparency=1),
        pictures.encode(Image.fromarray(np.full(SIZE[::-1], 999, np.uint16)), transparency=999),
    ],
)
def test_transparent_pixels_show_the_background(data: bytes) -> None:
    assert _near(_shown(data, background=(1, 2, 3)), (1, 2, 3), 0)


# ------------------------------------------------------------------ depth


def _png16(samples: np.ndarray, colour: int) -> bytes:
    """A PNG file of 16 bits; `samples` (height, width, channels), `colour` is PNG's type."""
    height, width = samples.shape[:2]
    rows = np.concatenate(
        [np.zeros((height, 1), np.uint8), samples.astype(">u2").view(np.uint8).reshape(height, -1)],
        axis=1,
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    )
    framed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("value", [0, 257, 20_000, 32_768, 65_535])
def test_sixteen_bit_samples_are_scaled_to_eight_bits(value: int) -> None:
    wanted = (value // 256,) * 3
    grey = np.full((*SIZE[::-1], 1), value, np.uint16)
    assert _near(_shown(_png16(grey, 0)), wanted, 0)
    assert _near(_shown(_png16(grey.repeat(3, axis=2), 2)), wanted, 0)
    solid = np.concatenate([grey.repeat(3, axis=2), np.full_like(grey, 65_535)], axis=2)
    assert _near(_shown(_png16(solid, 6)), wanted, 0)
    image = Image.fromarray(grey[:, :, 0])
    assert _near(_shown(pictures.encode(image, "TIFF")), wanted, 0)
    assert _near(_shown(pictures.encode(image, "TIFF", compression="tiff_lzw")), wanted, 0)


def test_sixteen_bit_white_is_zero_tiff_is_inverted() -> None:
    image = Image.fromarray(np.full(SIZE[::-1], 65_535, np.uint16))
    assert _near(_shown(pictures.encode(image, "TIFF", tiffinfo={262: 0})), (0, 0, 0), 0)


@pytest.mark.parametrize(
    ("low", "value", "high", "wanted"),
    [
        (0.0, 0.25, 1.0, 64),
        (0.0, 200.0, 255.0, 200),
        (0.0, 500.0, 1000.0, 128),
        (-1.0, 0.0, 1.0, 128),
        (0.0, 0.5, 0.5, 128),
    ],
)
@pytest.mark.parametrize("odd", [None, np.nan, np.inf, -np.inf])
def test_float_samples_are_scaled_to_eight_bits(
    low: float, value: float, high: float, wanted: int, odd: float | None
) -> None:
    pixels = np.full(SIZE[::-1], value, np.float32)
    pixels[0, :2] = low, high
    if odd is not None:
        pixels[1, 1] = odd
    data = pictures.encode(Image.fromarray(pixels), "TIFF")
    assert _near(_shown(data), (wanted,) * 3, 1)
    shown = np.asarray(decode(data, DecodeOptions()).image)
    assert shown[0, 0, 0] == (0 if low <= 0 else shown[0, 0, 0])
    if odd is not None:
        assert shown[1, 1, 0] == shown[0, 1 if odd == np.inf else 0, 0]


@pytest.mark.parametrize(
    ("low", "value", "high", "wanted"),
    [(0, 200, 255, 200), (0, 32_768, 65_535, 128), (0, 500_000, 1_000_000, 127), (-50, 0, 50, 127)],
)
def test_integer_samples_of_32_bits_are_scaled_to_eight_bits(
    low: int, value: int, high: int, wanted: int
) -> None:
    pixels = np.full(SIZE[::-1], value, np.int32)
    pixels[0, :2] = low, high
    assert _near(_shown(pictures.encode(Image.fromarray(pixels), "TIFF")), (wanted,) * 3, 1)


def test_nan_samples_decode_to_black() -> None:
    pixels = np.full(SIZE[::-1], np.nan, np.float32)
    assert _near(_shown(pictures.encode(Image.fromarray(pixels), "TIFF")), (0, 0, 0), 0)


@pytest.mark.parametrize("bits", [10, 12])
def test_ten_and_twelve_bit_heif_is_scaled_to_eight_bits(bits: int) -> None:
    import pillow_heif

    values = np.full((64, 64, 3), 65_535 // 3, np.uint16)
    deep = pillow_heif.from_bytes("RGB;16", (64, 64), values.tobytes())
    file = io.BytesIO()
    pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
    try:
        deep.save(file, quality=95)
    finally:
        pillow_heif.options.SAVE_HDR_TO_12_BIT = False
    pixels = np.asarray(decode(file.getvalue(), DecodeOptions()).image)
    assert _near(pixels[32, 32].astype(int), (85, 85, 85), 2)


@pytest.mark.parametrize("bits", [10, 12])
def test_ten_and_twelve_bit_avif_is_scaled_to_eight_bits(bits: int) -> None:
    import pyvips

    flat = pyvips.Image.new_from_array(np.full((64, 64, 3), 65_535 // 3, np.uint16))
    picture = flat.copy(interpretation="rgb16")
    data = picture.heifsave_buffer(compression="av1", bitdepth=bits, Q=95)
    pixels = np.asarray(decode(bytes(data), DecodeOptions()).image)
    assert _near(pixels[32, 32].astype(int), (85, 85, 85), 2)


# ------------------------------------------------------------------ profiles

P3 = profiles.rgb(profiles.DISPLAY_P3, profiles.srgb_curve())
ADOBE = profiles.rgb(profiles.ADOBE_RGB, profiles.gamma(2.2))
SRGB = profiles.rgb(profiles.SRGB, profiles.srgb_curve())


def _in_srgb(colour: tuple[int, int, int], primaries: Any, gamma: float | None) -> np.ndarray:
    """Converts by the formulas of the colour spaces."""
    values = np.array(colour) / 255
    light = (
        values**gamma
        if gamma
        else np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    )
    mixed = np.linalg.solve(profiles.to_xyz(profiles.SRGB), profiles.to_xyz(primaries) @ light)
    mixed = np.clip(mixed, 0, 1)
    shown = np.where(mixed <= 0.0031308, mixed * 12.92, 1.055 * mixed ** (1 / 2.4) - 0.055)
    return shown * 255


@pytest.mark.parametrize("colour", [RED, TEAL, GREY, (255, 0, 0), (90, 160, 60)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("profile", "primaries", "gamma"),
    [(P3, profiles.DISPLAY_P3, None), (ADOBE, profiles.ADOBE_RGB, 2.2)],
)
def test_wide_gamut_profiles_are_applied(
    profile: bytes, primaries: Any, gamma: float | None, kind: str, colour: tuple[int, int, int]
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = pictures.encode(Image.new("RGB", SIZE, colour), kind, icc_profile=profile, **options)
    assert _near(_shown(data), _in_srgb(colour, primaries, gamma), 2)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "HEIF"])
def test_phone_camera_profiles_are_applied(kind: str) -> None:
    image = Image.new("RGB", (64, 64), TEAL)
    if kind == "HEIF":
        data = encoded.heif(image, icc_profile=P3)
    else:
        data = pictures.encode(image, kind, quality=98, icc_profile=P3)
    pixels = np.asarray(decode(data, DecodeOptions()).image)
    wanted = _in_srgb(TEAL, profiles.DISPLAY_P3, None)
    assert _near(pixels[32, 32].astype(int), wanted, 5)
    assert not _near(np.array(TEAL), wanted, 10)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_profiles_are_applied_to_palettes_and_transparent_pixels(mode: str) -> None:
    image = Image.new("RGBA", SIZE, (*TEAL, 255))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
    data = pictures.encode(image, icc_profile=P3)
    assert _near(_shown(data), _in_srgb(TEAL, profiles.DISPLAY_P3, None), 2)


def test_grey_profiles_are_applied() -> None:
    data = pictures.encode(Image.new("L", SIZE, 64), icc_profile=profiles.grey(profiles.gamma(1.0)))
    assert _near(_shown(data), (137, 137, 137), 2)  # a quarter of the luminance


def test_an_srgb_profile_changes_no_pixel() -> None:
    photo = pictures.photo((64, 48))
    data = pictures.encode(photo, icc_profile=SRGB)
    assert np.array_equal(np.asarray(decode(data, DecodeOptions()).image), np.asarray(photo))
    assert change_of(SRGB, "RGB") is None


@pytest.mark.parametrize("profile", [b"", b"no profile", P3[:300], bytes(5000), P3 * 1000])
def test_broken_profiles_are_ignored(profile: bytes) -> None:
    data = pictures.encode(Image.new("RGB", SIZE, TEAL), "TIFF", icc_profile=profile)
    assert _near(_shown(data), TEAL, 0)


def test_profiles_for_another_colour_space_are_ignored() -> None:
    grey = profiles.grey(profiles.gamma(1.0))
    data = pictures.encode(Image.new("RGB", SIZE, TEAL), icc_profile=grey)
    assert _near(_shown(data), TEAL, 0)
    data = pictures.encode(Image.new("L", SIZE, 64), icc_profile=P3)
    assert _near(_shown(data), (64, 64, 64), 0)


def test_cmyk_profiles_are_applied() -> None:
    import pyvips

    profile = bytes(pyvips.Image.profile_load("cmyk"))
    shown = {}
    for name, inks in {
        "paper": (0, 0, 0, 0),
        "black": (0, 0, 0, 255),
        "cyan": (255, 0, 0, 0),
    }.items():
        image = Image.new("CMYK", SIZE, inks)
        shown[name] = _shown(pictures.encode(image, "JPEG", quality=98, icc_profile=profile))
    assert _near(shown["paper"], (255, 255, 255), 3)
    assert shown["black"].max() < 70
    # Cyan as printed, not the (0, 255, 255) of a screen.
    assert shown["cyan"][0] < 60
    assert 140 < shown["cyan"][1] < 190
    assert 190 < shown["cyan"][2] < 245


@pytest.mark.parametrize(
    "curve",
    [
        profiles.srgb_curve(),
        profiles.gamma(2.2),
        profiles.parametric(0, 1.8),
        profiles.parametric(1, 2.0, 1.1, -0.1),
        profiles.parametric(2, 2.0, 1.05, -0.05, 0.0),
        profiles.parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
        profiles.parametric(4, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045, 0, 0),
    ],
)
@pytest.mark.parametrize("primaries", [profiles.DISPLAY_P3, profiles.ADOBE_RGB])
def test_the_fast_profile_conversion_agrees_with_the_slow_one(primaries: Any, curve: bytes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    change = change_of(profiles.rgb(primaries, curve), "RGB")
    assert change is not None
    assert change.shaper is not None
    slow = np.asarray(change.applied(Image.fromarray(pixels))).astype(int)
    fast = change.shaper.applied(pixels.copy()).astype(int)
    assert np.abs(fast - slow).max() <= 2


# ------------------------------------------------------------------ TIFF encodings


@pytest.mark.parametrize("coding", ["lzma", "zstd"])
def test_rare_tiff_encodings_are_refused(coding: str) -> None:
    data = pictures.encode(Image.new("RGB", SIZE, RED), "TIFF", compression=coding)
    with pytest.raises(UnsupportedImageFormat, match=coding):
        decode(data, DecodeOptions())

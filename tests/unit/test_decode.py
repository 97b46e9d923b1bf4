"""Decoding: orientation, reduced sizes, limits, and refused files."""

import functools
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks import photos
from server.errors import ImageTooLarge, InvalidImage, UnsupportedImageFormat
from server.imaging.codecs import pillow, png, webp
from server.imaging.decode import DecodeOptions, decode
from server.imaging.sizing import FixedSize, NativeResolution, Size
from tests import encoded, pictures

PHOTO = pictures.photo((321, 243), 1)
FILES = encoded.files(PHOTO)
EVEN = pictures.photo((320, 240), 1)


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def test_heif_decodes_to_the_encoded_picture() -> None:
    image = decode(FILES["heif"], DecodeOptions()).image
    assert _psnr(np.asarray(image), np.asarray(PHOTO)) > 35


def test_pillow_and_numpy_views_share_the_pixels() -> None:
    data = FILES["jpeg"]
    image = decode(data, DecodeOptions()).image
    before = np.array(image)
    assert isinstance(image, Image.Image)
    assert image.getpixel((5, 7)) == tuple(before[7, 5])
    image.putpixel((5, 7), (1, 2, 3))
    assert tuple(np.asarray(image)[7, 5]) == (1, 2, 3)
    copied = decode(data, DecodeOptions()).image.copy()
    assert np.array_equal(np.asarray(copied), before)


# ------------------------------------------------------------------ orientation


@pytest.mark.parametrize("orientation", pictures.STORED_AS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_every_exif_orientation_is_decoded_upright(kind: str, orientation: int) -> None:
    corners = np.zeros((48, 64, 3), np.uint8)
    corners[:24, :32] = (255, 0, 0)
    corners[:24, 32:] = (0, 255, 0)
    corners[24:, 32:] = (0, 0, 255)
    stored = Image.fromarray(np.ascontiguousarray(pictures.STORED_AS[orientation](corners)))
    decoded = decode(encoded.turned(stored, kind, orientation), DecodeOptions())
    assert decoded.size == decoded.image.size == (64, 48)
    difference = np.abs(np.asarray(decoded.image).astype(int) - corners)
    # Lossy codecs blur the edges; a corner of another colour is 255 off.
    assert difference[4:20, 4:28].max() < 40
    assert difference[28:44, 36:60].max() < 40
    assert difference[4:20, 36:60].max() < 40


def test_png_orientation_after_the_image_data_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = b"eXIf" + exif.tobytes()[6:]
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    plain = pictures.encode(PHOTO)
    turned = decode(plain[:-12] + framed + plain[-12:], DecodeOptions()).image
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(PHOTO), -1))


def test_damaged_exif_leaves_the_orientation_unchanged() -> None:
    data = pictures.encode(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data, DecodeOptions()).image.size == PHOTO.size


# ------------------------------------------------------------------ reduction


@pytest.fixture
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream pictures of every size, because drawing a large one takes long."""
    for codec in (pillow, png, webp):
        monkeypatch.setattr(codec, "_MAX_WHOLE_PIXELS", 0)


@pytest.mark.parametrize("name", ["jpeg", "jpeg turned", "jpeg cmyk", "jpeg grey", "jpeg 4:4:4"])
def test_reduced_jpeg_matches_the_full_decode(name: str) -> None:
    data = encoded.jpegs(EVEN)[name]
    rule = NativeResolution(28, 784, 112 * 112)
    whole = decode(data, DecodeOptions())
    less = decode(data, DecodeOptions(), rule.target)
    assert less.size == whole.image.size
    assert less.image.size == (whole.image.width // 2, whole.image.height // 2)
    small = whole.image.resize(less.image.size, Image.Resampling.BOX)
    difference = np.asarray(less.image, np.float32) - np.asarray(small, np.float32)
    assert np.abs(difference).mean() < 6  # a different picture differs by more than 40


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((320, 240), (130, 98), (160, 120)),
        (
            (320, 240),
            (140, 105),
            (320, 240),
        ),  # too close to the target for the final filter to be effective
        ((320, 240), (80, 60), (160, 120)),
        ((320, 240), (50, 38), (80, 60)),
        ((321, 240), (130, 98), (321, 240)),  # half a pixel off at the right
        ((321, 240), (60, 45), (161, 120)),
    ],
)
def test_jpeg_is_reduced_to_the_smallest_sufficient_scale(
    size: Size, target: Size, expected: Size
) -> None:
    data = pictures.encode(EVEN.crop((0, 0, *size)), "JPEG")
    assert decode(data, DecodeOptions(), FixedSize(*target).target).image.size == expected


def test_only_jpeg_asks_for_a_reduced_size() -> None:
    asked: list[Any] = []
    for name in ("png", "webp", "gif", "avif", "tiff"):
        decode(FILES[name], DecodeOptions(), lambda *size: asked.append(size))
    assert asked == []


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("target", [(480, 360), (282, 211)])
def test_reduced_photos_match_full_decodes_after_resizing(
    kind: str, target: Size, every_size_is_large: None
) -> None:
    _check_fidelity(_photo(kind), target, 40)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_reduced_text_matches_a_full_decode_after_resizing(
    kind: str, every_size_is_large: None
) -> None:
    _check_fidelity(_encoded(_page(), kind), (425, 553), 35)


@functools.cache
def _photo(kind: str) -> bytes:
    return _encoded(_drawn_photo(), kind)


@functools.cache
def _drawn_photo() -> Image.Image:
    return Image.open(io.BytesIO(photos.photo(1440, 1080, 4)))


@functools.cache
def _page() -> Image.Image:
    """A quarter of a page, from its middle, with paragraphs and a part of the table."""
    page = Image.open(io.BytesIO(photos.page(2550, 3300, 4)))
    return page.crop((640, 1200, 640 + 1280, 1200 + 1664))


def _encoded(image: Image.Image, kind: str) -> bytes:
    options = {"PNG": {"compress_level": 1}, "TIFF": {}}.get(kind, {"quality": 90})
    return pictures.encode(image, kind, **options)


def _check_fidelity(data: bytes, target: Size, least: float) -> None:
    """Resize as the processor does at the end: bicubic and antialiased, like Pillow."""
    whole = decode(data, DecodeOptions()).image
    less = decode(data, DecodeOptions(), FixedSize(*target).target)
    assert less.size == whole.size
    assert less.image.width < whole.width
    assert less.image.width >= target[0]
    assert less.image.height >= target[1]
    ours, theirs = (
        np.asarray(image.resize(target, Image.Resampling.BICUBIC)) for image in (less.image, whole)
    )
    assert _psnr(ours, theirs) >= least


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("PNG", png, {"compress_level": 1}),
        ("TIFF", pillow, {}),
        ("WEBP", webp, {"quality": 70, "method": 0}),
    ],
)
def test_large_pictures_are_streamed(
    kind: str, codec: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 10_000_000 < codec._MAX_WHOLE_PIXELS < 40_000_000
    monkeypatch.setattr(codec, "_MAX_WHOLE_PIXELS", 2000 * 1000)  # quick to encode
    for height, is_large in ((1000, False), (1052, True)):
        large = _tiled().crop((0, 0, 2000, height))
        data = pictures.encode(large, kind, **options)
        less = decode(data, DecodeOptions(), FixedSize(2000 // 8, height // 8).target)
        assert less.size == (2000, height)
        assert less.image.size == ((400, height // 5 + 1) if is_large else less.size)
        whole = decode(data, DecodeOptions()).image
        if kind != "WEBP":
            assert np.array_equal(np.asarray(whole), np.asarray(large))
        small = np.asarray(whole.resize(less.image.size, Image.Resampling.BICUBIC))
        # libwebp uses a different averaging filter; a different picture has 12 dB.
        assert _psnr(np.asarray(less.image), small) > (25 if kind == "WEBP" else 40)


@functools.cache
def _tiled() -> Image.Image:
    """A picture that is drawn and encoded quickly."""
    tile = pictures.photo((400, 350), 3).filter(ImageFilter.GaussianBlur(1))
    tiled = Image.new("RGB", (2000, 1052))
    for left in range(0, 2000, 400):
        for top in range(0, 1052, 350):
            tiled.paste(tile, (left, top))
    return tiled


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0)])
def test_colours_of_transparent_pixels_do_not_bleed_into_reduced_pictures(
    kind: str, background: tuple[int, int, int], every_size_is_large: None
) -> None:
    picture = Image.new("RGBA", (400, 400), (0, 255, 0, 0))
    picture.paste((200, 0, 0, 255), (100, 100, 300, 300))
    options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = pictures.encode(picture, kind, **options)
    less = decode(data, DecodeOptions(background=background), FixedSize(80, 80).target).image
    assert less.size == (134, 134)
    shown = np.asarray(less).astype(int)
    assert np.abs(shown[67, 67] - (200, 0, 0)).max() <= 2
    assert np.abs(shown[5, 5] - background).max() <= 2
    assert (shown[:, :, 1] <= background[1] + 2).all()


def test_a_picture_is_not_reduced_if_the_processor_would_treat_it_differently(
    every_size_is_large: None,
) -> None:
    data = FILES["webp"]

    def flighty(width: int, height: int) -> Size:
        return (50, 50) if width == PHOTO.width else (51, 50)

    assert decode(data, DecodeOptions(), flighty).image.size == PHOTO.size
    assert decode(data, DecodeOptions(), FixedSize(50, 50).target).image.size == (107, 81)


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "JPEG", "BMP"])
def test_the_pixel_limit_is_checked_before_decoding(kind: str) -> None:
    large = pictures.encode(Image.new("L", (4000, 3000)), kind)
    with pytest.raises(ImageTooLarge, match="4000x3000 = 12000000 pixels.*11999999"):
        decode(large, DecodeOptions(max_pixels=11_999_999))
    assert decode(large, DecodeOptions(max_pixels=12_000_000)).size == (4000, 3000)


@pytest.mark.parametrize("name", [None, "webp", "avif", "heif"])
def test_a_picture_beyond_a_small_pixel_limit_is_refused(name: str | None) -> None:
    with pytest.raises(ImageTooLarge, match="321x243"):
        decode(FILES[name or "png"], DecodeOptions(max_pixels=1000))


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "DDS", "PPM", "JPEG2000", "EPS"])
def test_formats_outside_the_list_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedImageFormat, match="supported format"):
        decode(pictures.encode(PHOTO.resize((64, 64)), kind), DecodeOptions())


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"8BPS\0\1" + bytes(100),
        b"SIMPLE  =                    T" + bytes(3000),
        b"%PDF-1.7\n",
        b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
        b"P6 1 1 255 abc",
        b"\x89PN",
    ],
)
def test_files_that_are_not_images_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedImageFormat):
        decode(data, DecodeOptions())


def test_empty_data_is_refused() -> None:
    with pytest.raises(InvalidImage, match="empty"):
        decode(b"", DecodeOptions())

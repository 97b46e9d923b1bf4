"""Decoding: the same pixels as vLLM's loader, or fewer of them; clear refusals."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.errors import ImageTooLarge, InvalidImage
from server.images.decode import DecodeOptions, decode
from server.images.sizing import NativeResolution
from tests import pictures

PHOTO = pictures.photo((320, 240), 1)


def _files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right
    transparent = PHOTO.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    return {
        "jpeg": pictures.encode(PHOTO, "JPEG", quality=90),
        "jpeg turned": pictures.encode(PHOTO, "JPEG", quality=90, exif=exif),
        "jpeg cmyk": pictures.encode(PHOTO.convert("CMYK"), "JPEG"),
        "jpeg grey": pictures.encode(PHOTO.convert("L"), "JPEG"),
        "jpeg progressive": pictures.encode(PHOTO, "JPEG", progressive=True),
        "png": pictures.encode(PHOTO),
        "png palette": pictures.encode(PHOTO.quantize(16)),
        "png transparent": pictures.encode(transparent),
        "png grey alpha": pictures.encode(transparent.convert("LA")),
        "webp": pictures.encode(PHOTO, "WEBP"),
        "gif": pictures.encode(PHOTO, "GIF"),
        "bmp": pictures.encode(PHOTO, "BMP"),
        "tiff": pictures.encode(PHOTO, "TIFF"),
        "avif": pictures.encode(PHOTO, "AVIF"),
    }


@pytest.mark.parametrize("name", _files())
def test_full_decode_equals_vllms_loader(name: str) -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    data = _files()[name]
    ours = decode(data, DecodeOptions()).image
    theirs = ImageMediaIO().load_bytes(data).media
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("name", ["jpeg", "jpeg turned", "jpeg cmyk", "jpeg grey"])
def test_reduced_jpeg_is_the_same_picture(name: str) -> None:
    data = _files()[name]
    rule = NativeResolution(28, 784, 140 * 140)
    whole = decode(data, DecodeOptions())
    reduced = decode(data, DecodeOptions(), rule.target)
    assert reduced.size == whole.image.size
    assert reduced.image.size == (whole.image.width // 2, whole.image.height // 2)
    small = whole.image.resize(reduced.image.size, Image.Resampling.BOX)
    difference = np.asarray(reduced.image, np.float32) - np.asarray(small, np.float32)
    assert np.abs(difference).mean() < 6  # of another picture: above 40


def test_only_jpeg_is_reduced() -> None:
    asked: list[Any] = []
    decode(_files()["png"], DecodeOptions(), lambda *size: asked.append(size))
    assert asked == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (_files()["png"][:200], "damaged|truncated"),
        (_files()["jpeg"][:2000], "truncated"),
        (_files()["jpeg"][:10], "not an image|truncated|damaged"),
        (_files()["webp"][:500], "not an image|damaged|truncated"),
    ],
)
def test_damaged_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        decode(data, DecodeOptions())


def test_pixels_are_limited_before_they_are_decoded() -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(ImageTooLarge, match="20000x20000 = 400000000 pixels.*100000000"):
        decode(file.getvalue(), DecodeOptions())


def test_formats_outside_the_list_are_refused() -> None:
    for kind in ("ICO", "TGA", "PCX", "SGI", "DDS"):
        with pytest.raises(InvalidImage, match="supported format"):
            decode(pictures.encode(PHOTO.resize((64, 64)), kind), DecodeOptions())

"""How much memory decoding takes: pictures in costly formats are decoded in bands, or limited to
fewer pixels."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.errors import ImageTooLarge
from server.imaging.codecs.base import BYTES_PER_PIXEL
from server.imaging.convert import array_of
from server.imaging.decode import DecodeOptions, decode, warm_up
from tests import pictures
from tests.corpus.writers import png, tiff

SIZE = (60, 40)
PIXELS = SIZE[0] * SIZE[1]
PHOTO = pictures.photo(SIZE, 1)
_MORE = {"save_all": True, "append_images": [PHOTO.rotate(180)], "duration": 50}
_TURNED = Image.Exif()
_TURNED[0x0112] = 6

# The file, the options, and the bytes that a pixel takes.
COSTLY = {
    "progressive CMYK JPEG": (
        pictures.encode(PHOTO.convert("CMYK"), "JPEG", progressive=True),
        DecodeOptions(),
        13,
    ),
    "turned TIFF": (pictures.encode(PHOTO, "TIFF", exif=_TURNED), DecodeOptions(), 12),
    "later frame of a GIF": (pictures.encode(PHOTO, "GIF", **_MORE), DecodeOptions(frame=1), 19),
    "later frame of a PNG": (pictures.encode(PHOTO, "PNG", **_MORE), DecodeOptions(frame=1), 19),
    "frame of a WebP": (pictures.encode(PHOTO, "WEBP", **_MORE), DecodeOptions(), 19),
    "AVIF": (pictures.encode(PHOTO, "AVIF"), DecodeOptions(), 19),
    "JPEG as RGBA": (pictures.encode(PHOTO, "JPEG"), DecodeOptions("RGBA"), 13),
    "PNG in its mode": (pictures.encode(PHOTO, "PNG"), DecodeOptions(None), 13),
}


def _limited(options: DecodeOptions, max_pixels: int) -> DecodeOptions:
    return DecodeOptions(options.mode, options.background, max_pixels, options.frame)


@pytest.mark.parametrize("name", COSTLY)
def test_costly_pictures_may_have_fewer_pixels(name: str) -> None:
    data, options, cost = COSTLY[name]
    enough = -(-PIXELS * cost // BYTES_PER_PIXEL)
    decode(data, _limited(options, enough))
    with pytest.raises(ImageTooLarge, match=r"0 = 2400 pixels, the limit is 23\d\d pixels in"):
        decode(data, _limited(options, enough - cost))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_usual_pictures_may_have_all_pixels(kind: str) -> None:
    assert decode(pictures.encode(PHOTO, kind), DecodeOptions(max_pixels=PIXELS)).size == SIZE


def test_a_reduced_picture_takes_less_memory_and_is_not_refused() -> None:
    data, options, _ = COSTLY["JPEG as RGBA"]
    small = decode(data, _limited(options, PIXELS), lambda width, height: (12, 8))
    assert small.image.width < SIZE[0]


# ------------------------------------------------------------------ measured

SIDE = 4000
# What malloc may keep of memory that was freed, or get in advance: by mallopt(3), twice the largest
# block that it had from mmap, and Pillow asks for blocks of 16 MiB.
KEPT_BYTES = 32 << 20


def _grey_tiff(bits: int, kind: int) -> bytes:
    strip = zlib.compress(bytes(100 * SIDE * bits // 8))
    return tiff.tiff(
        (SIDE, SIDE),
        [strip] * (SIDE // 100),
        (bits,),
        tiff.GREY,
        tiff.Tag(tiff.COMPRESSION, tiff.SHORT, [tiff.DEFLATE]),
        tiff.Tag(tiff.SAMPLE_FORMAT, tiff.SHORT, [kind]),
    )


def _grey_png() -> bytes:
    data = png.zlib_repeated(b"\0" + bytes(2 * SIDE), SIDE)
    return png.png(
        png.ihdr(SIDE, SIDE, 16, png.GREY),
        png.chunk(b"tRNS", bytes(2)),
        png.chunk(b"IDAT", data),
    )


@pytest.mark.parametrize(
    "data",
    [_grey_tiff(32, 3), _grey_tiff(32, 2), _grey_tiff(16, 2), _grey_png()],
    ids=["float", "signed 32", "signed 16", "16 bits with a transparent grey"],
)
def test_pictures_of_more_than_eight_bits_take_no_more_memory_than_others(data: bytes) -> None:
    warm_up()  # as before workers are forked
    decode(pictures.encode(PHOTO), DecodeOptions())
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    decode(data, DecodeOptions())
    assert _memory("VmHWM") - before < BYTES_PER_PIXEL * SIDE * SIDE + KEPT_BYTES


def _memory(name: str) -> int:
    """In bytes."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_an_array_of_a_picture_equals_numpys() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"):
        image = pictures.photo((30, 200), 2).convert(mode)
        array = array_of(image)
        assert array.dtype == np.asarray(image).dtype
        assert np.array_equal(array, np.asarray(image))


@pytest.mark.parametrize("mode", [None, "L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
@pytest.mark.parametrize("stored", ["L", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_those_of_pillow(stored: str, mode: str | None) -> None:
    image = pictures.photo((30, 200), 2).convert(stored)
    data = pictures.encode(image, "TIFF" if stored == "CMYK" else "PNG")
    shown = decode(data, DecodeOptions(mode)).image
    expected = image if mode is None else image.convert(mode)
    assert shown.mode == expected.mode
    assert shown.tobytes() == expected.tobytes()

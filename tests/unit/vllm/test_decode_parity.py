"""Full decodes have the same pixels as those of vLLM's loader."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.media.image import ImageMediaIO

from server.imaging.decode import DecodeOptions, decode
from tests import encoded, pictures

FILES = encoded.files(pictures.photo((321, 243), 1))


def _theirs(data: bytes, **options: Any) -> Image.Image:
    loaded: Image.Image = ImageMediaIO(**options).load_bytes(data).media
    return loaded


# vLLM cannot read HEIF, and it shows the colour that an RGB file declares transparent.
UNLIKE_VLLM = {"heif", "heif alpha", "png transparent"}


@pytest.mark.parametrize("name", [name for name in FILES if name not in UNLIKE_VLLM])
def test_full_decode_equals_vllms_loader(name: str) -> None:
    ours, theirs = decode(FILES[name], DecodeOptions()).image, _theirs(FILES[name])
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(
    ("colour", "bits"),
    [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)],
)
def test_png_rows_of_every_filter_equal_vllms_loader(colour: int, bits: int) -> None:
    """The filtered rows are random bytes."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = np.random.default_rng(bits).integers(
        0, 256, (90, 1 + -(-37 * channels * bits // 8)), dtype=np.uint8
    )
    rows[:, 0] = np.arange(90) % 5
    rows[0, 0] = 4  # it has no row above
    header = struct.pack(">IIBBBBB", 37, 90, bits, colour, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        chunk = kind + body
        data += struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    background = (1, 2, 3)
    ours = np.asarray(decode(data, DecodeOptions(background=background)).image)
    theirs = np.asarray(_theirs(data, rgba_background_color=background))
    if (colour, bits) == (0, 16):  # which vLLM clips
        theirs = (np.asarray(Image.open(io.BytesIO(data))) >> 8).astype(np.uint8)[:, :, None]
        theirs = theirs.repeat(3, axis=2)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", [None, "L", "RGBA", "CMYK"])
@pytest.mark.parametrize("name", ["jpeg", "jpeg grey", "png", "png palette 200", "png alpha"])
def test_other_modes_equal_vllms_loader(name: str, mode: str | None) -> None:
    ours = decode(FILES[name], DecodeOptions(mode=mode)).image
    theirs = _theirs(FILES[name], image_mode=mode)
    assert ours.mode == theirs.mode
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("name", ["png alpha", "webp alpha", "png palette transparent"])
def test_other_backgrounds_equal_vllms_loader(name: str) -> None:
    ours = decode(FILES[name], DecodeOptions(background=(10, 200, 30))).image
    theirs = _theirs(FILES[name], rgba_background_color=(10, 200, 30))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))

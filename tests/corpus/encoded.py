"""One picture as a file of each of the eight supported formats."""

import io
from collections.abc import Callable
from typing import Any

import pillow_heif
from PIL import Image

from tests.pictures import encode

MIMES = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
    "avif": "image/avif",
    "heic": "image/heic",
}
# The number of bytes that identify a format.
MAGIC_BYTES = {
    "jpeg": 3, "png": 8, "webp": 12, "gif": 6, "bmp": 2, "tiff": 4, "avif": 12, "heic": 12,
}  # fmt: skip

Encode = Callable[[Image.Image], bytes]


def heic(image: Image.Image, **options: Any) -> bytes:
    """A HEIC file. Its encoder uses threads, which must not affect the bytes."""
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **{"quality": 90, **options})
    return file.getvalue()


def avif(image: Image.Image, **options: Any) -> bytes:
    return encode(image, "AVIF", **{"quality": 90, "speed": 8, "max_threads": 1, **options})


FORMATS: dict[str, Encode] = {
    "jpeg": lambda image: encode(image, "JPEG", quality=95, subsampling=0),
    "png": lambda image: encode(image, "PNG"),
    "webp": lambda image: encode(image, "WEBP", quality=95, exact=True),
    "gif": lambda image: encode(image, "GIF"),
    "bmp": lambda image: encode(image, "BMP"),
    "tiff": lambda image: encode(image, "TIFF"),
    "avif": avif,
    "heic": heic,
}

"""From encoded bytes to an upright picture in a given mode, at the smallest useful scale.

    header -> decoder -> size checked -> decoded, maybe smaller -> colours -> upright

Only the formats in `_OPENERS` are opened.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from server.errors import ImageTooLarge, InvalidImage, SaccadeError
from server.imaging import convert, sizing
from server.imaging import header as headers
from server.imaging.codecs import pillow, webp
from server.imaging.codecs.base import SIDEWAYS, Source, opencv, reduced
from server.imaging.codecs.heif import AvifSource, HeifSource
from server.imaging.codecs.jpeg import JpegSource
from server.imaging.codecs.pillow import BmpSource, GifSource, TiffSource
from server.imaging.codecs.png import open_png

# (upright width, height) -> the size to cover, or None for the whole picture.
TargetSize = Callable[[int, int], sizing.Size | None]

_OPENERS: dict[str, Callable[[bytes, int], Source]] = {
    "JPEG": JpegSource,
    "PNG": open_png,
    "WEBP": webp.open_webp,
    "GIF": GifSource,
    "BMP": BmpSource,
    "TIFF": TiffSource,
    "AVIF": AvifSource,
    "HEIF": HeifSource,
}
FORMATS = tuple(_OPENERS)
_WITH_FRAMES = frozenset(("GIF", "PNG", "TIFF", "AVIF"))

# In pixels: at a quarter of a pixel, the PSNR is still 40 dB.
_MAX_DRIFT = 0.25

# What libraries raise on damaged files. Pillow raises TypeError on a TIFF file without a width.
_DAMAGE = (
    TypeError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class DecodeOptions:
    """`mode` is Pillow's (None keeps the file's mode); `background` lies under transparency.

    `frame` is the number of an animation's frame or a file's page, from 0.
    """

    mode: str | None = "RGB"
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000
    frame: int = 0


@dataclass(frozen=True)
class Decoded:
    """`size` is the upright (width, height) in pixels of the picture before any reduction."""

    image: Image.Image
    size: sizing.Size


def decode(data: bytes, options: DecodeOptions, target_size: TargetSize | None = None) -> Decoded:
    """Decode `data`, at the smallest scale that covers the target size if there is one.

    `target_size(width, height)` gets the upright size and returns the size to cover, or None for
    the whole picture. Without a target size, the pixels of an 8-bit sRGB picture equal those of
    vLLM's loader; other pictures get the colours that their profile or format defines.

    Decoding may divide both sides by a whole number, rounding up: 2, 4 or 8 for JPEG, and up to 32
    for large WebP, PNG and TIFF files.

    Raises:
        UnsupportedImageFormat: the data is in none of `FORMATS`, or uses an unsupported
            compression.
        InvalidImage: truncated or damaged.
        ImageTooLarge: more than `options.max_pixels`, or too many to reach the frame.
        ImageFrameMissing: the file has fewer frames.
    """
    try:
        source = _OPENERS[headers.read(data).format](data, options.frame)
        size = _upright_size(source)
        _check_size(size, options.max_pixels)
        picture = source.load(_factor(source, size, target_size))
        image = convert.to_mode(picture, source.profile, options.mode, options.background)
        return Decoded(convert.upright(image, source.orientation), size)
    except SaccadeError:
        raise
    except _DAMAGE as error:
        raise InvalidImage(_explain(error)) from error


def warm_up() -> None:
    """Compile and import what decoders need before workers are forked, so that they share it.

    Workers import libraries that start threads, or that few pictures need, when they need them.
    """
    import deflate  # noqa: F401
    import simplejpeg  # noqa: F401

    from server.imaging.codecs import jpeg, kernels  # noqa: F401

    opencv()
    jpeg.warm_up()


def frame_count(data: bytes) -> int:
    """The number of frames or pages in the file; counting stops at `MAX_FRAMES`.

    Raises:
        UnsupportedImageFormat: the data is in none of `FORMATS`.
        InvalidImage: truncated or damaged.
    """
    try:
        format_ = headers.read(data).format
        if format_ == "WEBP" and webp.is_animated(data):
            return webp.count_frames(data)
        return pillow.count_frames(data, format_) if format_ in _WITH_FRAMES else 1
    except SaccadeError:
        raise
    except _DAMAGE as error:
        raise InvalidImage(_explain(error)) from error


def _upright_size(source: Source) -> sizing.Size:
    width, height = source.size
    return (height, width) if source.orientation in SIDEWAYS else (width, height)


def _check_size(size: sizing.Size, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width}x{height} = {width * height} pixels, "
            f"the limit is {max_pixels} pixels"
        )


def _factor(source: Source, size: sizing.Size, target_size: TargetSize | None) -> int:
    """The largest factor by which the sides can be divided and still cover the target size."""
    allowed = source.reductions
    target = target_size(*size) if target_size is not None and allowed.reserves else None
    if target_size is None or target is None:
        return 1
    is_checked = allowed.is_checked
    for factor, reserve in allowed.reserves.items():
        smaller = reduced(size, factor)
        sides = tuple(zip(size, smaller, target, strict=True))
        if any(less < wanted for _, less, wanted in sides):
            continue
        keeps = all(less >= reserve * wanted for _, less, wanted in sides) and not (
            allowed.drifts and any(_drift(factor, *side) > _MAX_DRIFT for side in sides)
        )
        if keeps and (is_checked or target_size(*smaller) == target):
            return factor
        is_checked = False  # `target_size` has only checked the largest factor that covers
    return 1


def _drift(factor: int, side: int, reduced_side: int, wanted: int) -> float:
    """The displacement of the last pixel, in pixels of the target size."""
    return wanted * (reduced_side * factor - side) / side


def _explain(error: Exception) -> str:
    if "truncated" in str(error) or isinstance(error, EOFError):
        return "the image is truncated"
    return "the image is damaged and cannot be decoded"

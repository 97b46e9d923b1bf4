"""From encoded bytes to an upright picture in the wanted mode, at the smallest useful scale.

    header -> decoder -> size checked -> decoded, maybe smaller -> colours -> upright

Only the formats in `_OPENERS` are ever opened, whatever the bytes claim.
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

# (upright width, height) -> the size wanted, or None for the whole picture.
Planner = Callable[[int, int], sizing.Size | None]

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

# In pixels: a quarter of one still leaves 40 dB.
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
    """`mode` is Pillow's (None keeps the picture's own); `background` lies under transparency.

    `frame` counts frames of an animation, or pages, from 0.
    """

    mode: str | None = "RGB"
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 100_000_000
    frame: int = 0


@dataclass(frozen=True)
class Decoded:
    """`size` is that of the upright picture before any reduction: (width, height) in pixels."""

    image: Image.Image
    size: sizing.Size


def decode(data: bytes, options: DecodeOptions, planner: Planner | None = None) -> Decoded:
    """Decode `data`; with a `planner`, at the smallest scale that covers its answer.

    `planner(width, height)` gets the upright size and answers the size wanted, or None for the
    whole picture. Without a planner, or with the answer None, the pixels of a picture in sRGB with
    eight bits equal those of vLLM's own loader; other pictures get the colours that their profile
    or format defines.

    Both sides may be divided by a whole number, and rounded up: in JPEG by 2, 4 or 8, in WebP and
    large PNG and TIFF files by any up to 32.

    Raises:
        UnsupportedImageFormat: the bytes do not begin like any of `FORMATS`, or have a compression
            that is not supported.
        InvalidImage: truncated or damaged.
        ImageTooLarge: more than `options.max_pixels`, or too many to reach the frame.
        ImageFrameMissing: there is no such frame.
    """
    try:
        source = _OPENERS[headers.read(data).format](data, options.frame)
        size = _upright_size(source)
        _check_size(size, options.max_pixels)
        picture = source.load(_factor(source, size, planner))
        image = convert.to_mode(picture, source.profile, options.mode, options.background)
        return Decoded(convert.upright(image, source.orientation), size)
    except SaccadeError:
        raise
    except _DAMAGE as error:
        raise InvalidImage(_explain(error)) from error


def warm_up() -> None:
    """Load what decoders compile or import before workers are forked, so that they share it.

    Libraries that start threads, or that few pictures need, are left to the workers.
    """
    import deflate  # noqa: F401
    import simplejpeg  # noqa: F401

    from server.imaging.codecs import jpeg, kernels  # noqa: F401

    opencv()
    jpeg.warm_up()


def frame_count(data: bytes) -> int:
    """The number of frames or pages in the file; counting stops at `MAX_FRAMES`.

    Raises:
        UnsupportedImageFormat: the bytes do not begin like any of `FORMATS`.
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


def _factor(source: Source, size: sizing.Size, planner: Planner | None) -> int:
    """The factor to divide the sides by, so that they still cover the planner's answer."""
    allowed = source.reductions
    target = planner(*size) if planner is not None and allowed.reserves else None
    if planner is None or target is None:
        return 1
    is_planned = allowed.is_planned
    for factor, reserve in allowed.reserves.items():
        smaller = reduced(size, factor)
        sides = tuple(zip(size, smaller, target, strict=True))
        if any(less < wanted for _, less, wanted in sides):
            continue
        keeps = all(less >= reserve * wanted for _, less, wanted in sides) and not (
            allowed.drifts and any(_drift(factor, *side) > _MAX_DRIFT for side in sides)
        )
        if keeps and (is_planned or planner(*smaller) == target):
            return factor
        is_planned = False  # the planner has only checked the largest factor that covers
    return 1


def _drift(factor: int, side: int, reduced_side: int, wanted: int) -> float:
    """How far the last pixel is displaced, in pixels of the wanted size."""
    return wanted * (reduced_side * factor - side) / side


def _explain(error: Exception) -> str:
    if "truncated" in str(error) or isinstance(error, EOFError):
        return "the image is truncated"
    return "the image is damaged and cannot be decoded"

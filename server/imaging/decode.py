"""From encoded bytes to an upright picture in a given mode, at the smallest useful scale.

    header -> decoder -> size checked -> decoded, maybe smaller -> colours -> upright

Only the formats in `_OPENERS` are opened.
"""

import codecs
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from server.errors import ImageTooLarge, InvalidImage, SaccadeError
from server.imaging import convert, sizing
from server.imaging import header as headers
from server.imaging.codecs import pillow, webp
from server.imaging.codecs.base import BYTES_PER_PIXEL, SIDEWAYS, Source, libvips, opencv, reduced
from server.imaging.codecs.heif import AvifSource, HeifSource
from server.imaging.codecs.jpeg import JpegSource
from server.imaging.codecs.pillow import BmpSource, GifSource, PillowSource, TiffSource
from server.imaging.codecs.png import open_png
from server.imaging.codecs.webp import WebpAnimation

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


class OpenAnimation:
    """An animation whose frames are decoded in one pass: frames build on each other, so a frame is
    decoded from the one before it instead of from the first.

    For one file, and for ascending frames. Once a frame has failed, all later ones fail alike.
    """

    def __init__(self) -> None:
        self._source: PillowSource | WebpAnimation | None = None
        self.error: SaccadeError | None = None

    def open(self, data: bytes, frame: int) -> Source:
        """The source of `data` at `frame`. Raises as `decode` does."""
        if self.error is not None:
            raise self.error
        if self._source is not None:
            self._source.move_to(frame)
            return self._source
        source = _open(data, frame)
        if isinstance(source, PillowSource | WebpAnimation):
            source.keeps = True
            self._source = source
        return source


def decode(
    data: bytes,
    options: DecodeOptions,
    target_size: TargetSize | None = None,
    animation: OpenAnimation | None = None,
) -> Decoded:
    """Decode `data`, at the smallest scale that covers the target size if there is one.

    `target_size(width, height)` gets the upright size and returns the size to cover, or None for
    the whole picture. `animation` keeps `data` open for its next frame; the picture must then no
    longer be in use. Without a target size, the pixels of an 8-bit sRGB picture equal those of
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
        source = (animation.open if animation is not None else _open)(data, options.frame)
        size = _upright_size(source)
        _check_size(size, options.max_pixels)
        factor = _factor(source, size, target_size)
        if factor == 1:
            _check_memory(source, options)
        profile, orientation = source.profile, source.orientation
        image = convert.to_mode(source.load(factor), profile, options.mode, options.background)
        del source  # `upright` may need its memory
        return Decoded(convert.upright(image, orientation), size)
    except _DAMAGE as error:
        raise _failed(InvalidImage(_explain(error)), animation) from error
    except SaccadeError as error:
        raise _failed(error, animation) from error.__cause__


def _failed(error: SaccadeError, animation: OpenAnimation | None) -> SaccadeError:
    if animation is not None:
        animation.error = error
    return error


def warm_up() -> None:
    """Compile and import all that decoders need before workers are forked: a worker cannot open
    files. Nothing here starts a thread, which would not survive the fork."""
    import deflate  # noqa: F401
    import pillow_heif  # noqa: F401
    import pypdfium2  # noqa: F401
    import simplejpeg  # noqa: F401

    from server.imaging.codecs import jpeg, kernels  # noqa: F401

    codecs.lookup("utf-16-le")  # in which PDFium gives texts
    Image.init()  # the plugins of all formats
    opencv()
    libvips()
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


def _open(data: bytes, frame: int) -> Source:
    return _OPENERS[headers.read(data).format](data, frame)


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


def _check_memory(source: Source, options: DecodeOptions) -> None:
    """Refuse a picture that takes more memory than one of `max_pixels` in a usual format."""
    cost = source.bytes_per_pixel
    if options.mode not in ("RGB", "L"):
        cost = max(cost, convert.OTHER_MODES_BYTES_PER_PIXEL)
    width, height = source.size
    limit = options.max_pixels * BYTES_PER_PIXEL // cost
    if cost > BYTES_PER_PIXEL and width * height > limit:
        raise ImageTooLarge(
            f"the image has {width}x{height} = {width * height} pixels, the limit is {limit} "
            "pixels in its format and mode, whose decoding takes more memory than usual"
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

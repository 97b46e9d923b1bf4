"""From encoded bytes to an upright picture in the wanted mode, at the smallest useful scale."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from server.errors import ImageFrameMissing, ImageTooLarge, InvalidImage
from server.images import sizing

# Readers that decode in this process. Left out: those that call an external program (EPS), that
# are stubs (WMF, BUFR, GRIB, HDF5), and those with a history of memory faults that no model user
# sends (JPEG 2000, FITS, PSD and the game and icon formats).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

# Pillow checks its own limit while it opens a file, without a word on the size. Ours replaces it.
Image.MAX_IMAGE_PIXELS = None

# EXIF orientations that swap width and height.
_SIDEWAYS = range(5, 9)

Planner = Callable[[int, int], sizing.Size | None]


@dataclass(frozen=True)
class DecodeOptions:
    """`mode` is Pillow's (None keeps the picture's own); `background` lies under transparency."""

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
    """Decode `data`; with a `planner`, JPEG at the smallest DCT scale that covers its answer.

    `planner(width, height)` gets the upright size and answers the size wanted, or None for the
    whole picture. Without a planner, or with the answer None, the pixels equal vLLM's own loader.

    Raises:
        InvalidImage: the bytes are no picture of a known format, or are damaged.
        ImageTooLarge: the header announces more than `options.max_pixels`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        size = _check_size(image, options.max_pixels)
        if options.frame:
            _seek(image, options.frame)
        if planner is not None and image.format == "JPEG":
            size = _reduce(image, planner)
            return Decoded(_load(image, options), size)
        image = _load(image, options)
        return Decoded(image, image.size)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError) as error:
        raise InvalidImage(_explain(error)) from error


def frame_count(data: bytes) -> int:
    """How many frames or pages the file has; counting stops at a thousand.

    Raises:
        InvalidImage: the bytes are no picture of a known format, or are damaged.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        return min(getattr(image, "n_frames", 1), 1000)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError) as error:
        raise InvalidImage(_explain(error)) from error


def _seek(image: Image.Image, frame: int) -> None:
    try:
        image.seek(frame)
    except EOFError as error:
        raise ImageFrameMissing(f"the image has no frame {frame}") from error


def _check_size(image: Image.Image, max_pixels: int) -> sizing.Size:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width}x{height} = {width * height} pixels, "
            f"the limit is {max_pixels} pixels"
        )
    return width, height


def _reduce(image: Image.Image, planner: Planner) -> sizing.Size:
    """Set the DCT scale of a JPEG that is not yet loaded; returns its upright full size."""
    width, height = image.size
    sideways = _orientation(image) in _SIDEWAYS
    upright = (height, width) if sideways else (width, height)
    target = planner(*upright)
    scale = sizing.jpeg_scale(upright, target)
    if scale > 1:
        image.draft(None, (width // scale, height // scale))
    return upright


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _load(image: Image.Image, options: DecodeOptions) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF leaves the picture as it is stored
        image = ImageOps.exif_transpose(image)
    image.load()
    return _to_mode(image, options)


def _to_mode(image: Image.Image, options: DecodeOptions) -> Image.Image:
    if options.mode is None or image.mode == options.mode:
        return image
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if options.mode == "RGB" and transparent:
        layers = image if image.mode == "RGBA" else image.convert("RGBA")
        flat = Image.new("RGB", layers.size, options.background)
        flat.paste(layers, mask=layers.getchannel("A"))
        return flat
    return image.convert(options.mode)


def _explain(error: Exception) -> str:
    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        return f"the data is not an image in a supported format ({', '.join(FORMATS)})"
    if "truncated" in text or isinstance(error, EOFError):
        return "the image is truncated"
    return "the image is damaged and cannot be decoded"

"""What decoders share: the types of a decoded picture, metadata, errors, large and deep
pictures."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageChops

from server.errors import ImageFrameMissing, InvalidImage, ran_out
from server.imaging.sizing import Size

Pixels: TypeAlias = npt.NDArray[np.uint8]

# EXIF orientations that swap width and height.
SIDEWAYS = range(5, 9)

# Frames and pages beyond this number are neither counted nor decoded.
MAX_FRAMES = 1000

_BAND_ROWS = 64

# A larger colour profile is ignored. Profiles of printing presses have up to 3 MB.
MAX_PROFILE_BYTES = 4 << 20


# Memory of decoding that a pixel may take, in bytes. Pillow keeps a pixel in one to four bytes, an
# RGB array has three, and decoders and conversions need about as much again.
BYTES_PER_PIXEL = 9


@dataclass(frozen=True)
class Indexed:
    """A picture with a colour table: `indices` is uint8 (height, width).

    `entries` is a picture of 256x1 pixels with the colour of each index, including palette and
    transparency.
    """

    indices: Pixels
    entries: Image.Image


# Arrays are uint8 (height, width, channels): grey, RGB or RGBA, by the number of channels.
Stored: TypeAlias = Image.Image | Indexed | Pixels


@dataclass(frozen=True)
class Reductions:
    """The factors by which a decoder can divide both sides, rounding up. Factor 1 always works.

    `reserves` maps each factor, largest first, to the ratio by which the reduced sides must exceed
    the target's. If the decoder's filter is worse than that of the final resize, the resize must
    shrink the picture further to hide the difference. These ratios keep 40 dB on photos and 35 dB
    on legible text.

    `drifts`: if a side is not a multiple of the factor, its last pixels cover fewer source pixels
    than the others, and the picture is stretched by a fraction of a pixel. `is_checked`: the target
    size is only given if the model's processor treats the reduced picture alike.
    """

    reserves: Mapping[int, float] = field(default_factory=dict)
    drifts: bool = False
    is_checked: bool = False


NO_REDUCTIONS = Reductions()
# libjpeg skips coefficients, which is less work than decoding the whole picture.
BY_DCT = Reductions({8: 1.2, 4: 1.2, 2: 1.2}, drifts=True, is_checked=True)
# libvips and libwebp average pixels.
BY_MEANS = Reductions(dict.fromkeys(range(32, 1, -1), 1.5))


class Source(Protocol):
    """An encoded picture whose header was read: `size` (width, height) in pixels as stored, EXIF
    `orientation`, ICC `profile`, and the `reductions` that the decoder can do. `bytes_per_pixel` is
    the most memory that decoding the whole picture to RGB takes, with the array of the result."""

    size: Size
    orientation: int
    profile: bytes | None
    reductions: Reductions
    bytes_per_pixel: int

    def load(self, factor: int) -> Stored:
        """Decode with both sides divided by `factor`, which is 1 or one of `reductions`."""
        ...


def reduced(size: Size, factor: int) -> Size:
    """`size` divided by `factor`, rounded up."""
    return -(-size[0] // factor), -(-size[1] // factor)


def orientation(image: Image.Image) -> int:
    """The orientation, 1 to 8, from the EXIF or else the XMP in `image.info`; 1 if missing."""
    try:
        # Not PNG's override, which would decode the picture to read the chunks behind it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # damaged EXIF does not mean damaged pixels
        return 1


def profile(image: Any) -> bytes | None:
    """The colour profile in the `info` of a Pillow or pillow_heif picture."""
    found: bytes | None = image.info.get("icc_profile")
    return found if found and len(found) <= MAX_PROFILE_BYTES else None


def only_first(frame: int) -> None:
    """Raises ImageFrameMissing unless `frame` is 0."""
    if frame:
        raise no_frame(frame)


def no_frame(frame: int) -> ImageFrameMissing:
    return ImageFrameMissing(f"the image has no frame {frame + 1}")


def truncated() -> InvalidImage:
    return InvalidImage("the image is truncated")


def damaged() -> InvalidImage:
    return InvalidImage("the image is damaged and cannot be decoded")


@functools.cache
def opencv() -> Any:
    """OpenCV, limited to one thread: each process decodes one picture. It is the fastest at turning
    pictures and swapping channels, and includes libwebp."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


# ---------------------------------------------------------------------- large pictures


@functools.cache
def libvips() -> Any:
    """libvips, limited to one thread for each picture, which it starts when it decodes."""
    import pyvips

    pyvips.vips_lib.vips_concurrency_set(1)  # one picture a process
    pyvips.cache_set_max(0)
    pyvips.block_untrusted_set(True)  # the readers below must not call others
    return pyvips


def load_large(reader: str, data: bytes, size: Size, factor: int) -> Pixels:
    """Decode an 8-bit picture of `size` with libvips, with its sides divided by `factor`. Returns
    uint8 (height, width, channels). `reader` is "pngload", "tiffload" or "webpload".

    Raises:
        InvalidImage: the file is truncated or damaged.
    """
    vips = libvips()
    width, height = reduced(size, factor)
    scaled = {"scale": 1 / factor} if reader == "webpload" and factor > 1 else {}
    try:
        source = vips.Source.new_from_memory(data)
        open_ = getattr(vips.Image, reader + "_source")
        image = open_(source, access="sequential", fail_on="error", **scaled)
        if (image.width, image.height) != (width, height):
            image = _shrunk(image, width, height)
        pixels = np.frombuffer(image.write_to_memory(), np.uint8)
    except vips.Error as error:
        if ran_out(error):
            raise MemoryError from error
        raise damaged() from error
    return pixels.reshape(image.height, image.width, image.bands)


def _shrunk(image: Any, width: int, height: int) -> Any:
    """Resize to exactly `width` x `height`: means over whole pixels would shift the picture if
    these do not divide its sides. Transparent pixels do not bleed into others."""
    across, down = width / image.width, height / image.height
    if not image.hasalpha():
        return image.resize(across, vscale=down, kernel="cubic")
    premultiplied = image.premultiply().resize(across, vscale=down, kernel="cubic")
    return premultiplied.unpremultiply().rint().cast("uchar")


# ---------------------------------------------------------------------- more than eight bits
# Pillow's conversion clips such samples, which makes most of them white.

_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def eight_bits(image: Image.Image, bits: int = 16, white_is_zero: bool = False) -> Image.Image:
    """Convert to eight bits per sample, in a mode that Pillow converts to RGB.

    16-bit grey keeps the upper 8 of `bits`, as Pillow's 16-bit RGB does. 32-bit integers keep their
    scale if they fit 8 or 16 bits, and floats if they fit 0..1 or 0..255; else the range from the
    smallest to the largest value becomes 0..255. Infinite values become the largest or smallest
    finite value, NaN the smallest. `white_is_zero` means that the largest value is black.
    """
    if image.mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[image.mode])
    if image.mode.startswith("I;16"):
        shrink: Callable[[Image.Image], Image.Image] = functools.partial(_upper, bits=bits)
    elif image.mode in ("I", "F"):
        shrink = functools.partial(_scaled, *_range(image), whole=image.mode == "I")
    else:
        return image
    if white_is_zero:
        return by_bands(image, lambda band: ImageChops.invert(shrink(band)))
    return by_bands(image, shrink)


def bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Bands of a few rows, each with its slice of rows, to keep intermediate pictures small."""
    width, height = image.size
    for top in range(0, height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert `image` one band at a time. `convert` treats all pixels alike."""
    done: Image.Image | None = None
    for rows, band in bands(image):
        converted = convert(band)
        if done is None:
            done = Image.new(converted.mode, image.size)
            done.info = converted.info
        done.paste(converted, (0, rows.start))
    assert done is not None
    return done


def _upper(band: Image.Image, bits: int) -> Image.Image:
    """The upper 8 of `bits`, as "L", or as "LA" if one value is transparent."""
    values = np.asarray(band)
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    grey.info = band.info
    key = band.info.get("transparency")
    if key is None:
        return grey
    alpha = Image.fromarray(np.where(values == key, np.uint8(0), np.uint8(255)))
    return Image.merge("LA", (grey, alpha))


def _range(image: Image.Image) -> tuple[float, float]:
    """The smallest and the largest finite value, as float32."""
    lows, highs = [], []
    for _, band in bands(image):
        numbers = np.asarray(band).astype(np.float32)
        finite = numbers[np.isfinite(numbers)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    return (min(lows), max(highs)) if lows else (0.0, 0.0)


def _scaled(low: float, high: float, band: Image.Image, *, whole: bool) -> Image.Image:
    """Scale a band of "I" (`whole`) or "F" to "L", from the range of the picture; see
    `eight_bits`."""
    numbers: npt.NDArray[Any] = np.asarray(band).astype(np.float32)
    np.nan_to_num(numbers, copy=False, nan=low, posinf=high, neginf=low)
    if low < 0 or high > (65535 if whole else 255):
        numbers = (numbers - low) * (255 / ((high - low) or 1))
    elif whole and high > 255:
        numbers = numbers / 256
    elif not whole and high <= 1:
        numbers = numbers * 255
    pixels = numbers if whole and high > 255 else np.rint(numbers)
    return Image.fromarray(pixels.astype(np.uint8))

"""What decoders share: the types of a decoded picture, metadata, errors, large and deep
pictures."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageChops

from server.errors import ImageFrameMissing, InvalidImage
from server.imaging.sizing import Size

Pixels: TypeAlias = npt.NDArray[np.uint8]

# EXIF orientations that swap width and height.
SIDEWAYS = range(5, 9)

# Frames and pages beyond this number are neither counted nor decoded.
MAX_FRAMES = 1000

# A larger colour profile is ignored. Profiles of printing presses have up to 3 MB.
MAX_PROFILE_BYTES = 4 << 20


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
    `orientation`, ICC `profile`, and the `reductions` that the decoder can do."""

    size: Size
    orientation: int
    profile: bytes | None
    reductions: Reductions

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
def _vips() -> Any:
    """libvips, imported on first use: its threads would not survive the fork that makes a worker,
    and most workers never need it."""
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
    vips = _vips()
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
        values = np.asarray(image)
        grey = Image.fromarray(_upper(values, bits))
        grey.info = image.info
        key = image.info.get("transparency")
        if key is not None:
            grey = _transparent(grey, values == key)
    elif image.mode in ("I", "F"):
        grey = Image.fromarray(_scaled(np.asarray(image)))
    else:
        return image
    return ImageChops.invert(grey) if white_is_zero else grey


def _upper(values: npt.NDArray[np.uint16], bits: int) -> npt.NDArray[np.uint8]:
    """The upper 8 of `bits`, without a second 16-bit array."""
    upper = np.empty(values.shape, np.uint8)
    np.right_shift(values, bits - 8, out=upper, casting="unsafe")
    return upper


def _transparent(grey: Image.Image, hidden: npt.NDArray[np.bool_]) -> Image.Image:
    alpha = Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255)))
    return Image.merge("LA", (grey, alpha))


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale int32 or float32 to uint8; see `eight_bits`."""
    whole = values.dtype.kind == "i"
    numbers: npt.NDArray[Any] = values.astype(np.float32)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    np.nan_to_num(numbers, copy=False, nan=low, posinf=high, neginf=low)
    if low < 0 or high > (65535 if whole else 255):
        numbers = (numbers - low) * (255 / ((high - low) or 1))
    elif whole and high > 255:
        numbers = numbers / 256
    elif not whole and high <= 1:
        numbers = numbers * 255
    return (numbers if whole and high > 255 else np.rint(numbers)).astype(np.uint8)

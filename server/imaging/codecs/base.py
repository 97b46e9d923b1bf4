"""What all decoders share: how a picture comes out of one, and what may go wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from server.errors import ImageFrameMissing, InvalidImage
from server.imaging.sizing import Size

Pixels: TypeAlias = npt.NDArray[np.uint8]

# EXIF orientations that swap width and height.
SIDEWAYS = range(5, 9)

# Frames and pages beyond these are not counted, and cannot be asked for.
MAX_FRAMES = 1000

# A larger colour profile is ignored. Those of printing presses have up to 3 MB.
MAX_PROFILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Indexed:
    """A picture of one number a pixel: `indices` uint8 (height, width).

    `entries` is a picture of 256x1 pixels that shows what each number stands for, with its palette
    and transparency.
    """

    indices: Pixels
    entries: Image.Image


# An array is uint8 (height, width, channels): grey, RGB or RGBA by its number of channels.
Stored: TypeAlias = Image.Image | Indexed | Pixels


@dataclass(frozen=True)
class Reductions:
    """By what a decoder can divide both sides, rounding up; it can always leave them as they are.

    `reserves` has the factors, largest first, and for each how many times the sides wanted the
    reduced sides must be: a filter worse than the one that makes the final size has to leave that
    one something to do. They keep 40 dB on photos and 35 dB on legible text.

    `drifts`: where a side is no multiple of the factor, its last pixels stand for less than the
    others, and the picture is stretched by a part of one. `is_planned`: the planner knows of the
    factors and has seen to it that the model's processor does the same with the reduced picture.
    """

    reserves: Mapping[int, float] = field(default_factory=dict)
    drifts: bool = False
    is_planned: bool = False


NO_REDUCTIONS = Reductions()
# libjpeg leaves coefficients out, which is less work than the whole picture.
BY_DCT = Reductions({8: 1.2, 4: 1.2, 2: 1.2}, drifts=True, is_planned=True)
# libvips and libwebp take means over pixels.
BY_MEANS = Reductions(dict.fromkeys(range(32, 1, -1), 1.5))


class Source(Protocol):
    """An encoded picture whose header was read: `size` in pixels and `orientation` as stored."""

    size: Size
    orientation: int
    profile: bytes | None
    reductions: Reductions

    def load(self, factor: int) -> Stored:
        """Decode, with both sides divided by `factor`, which is 1 or one of `reductions`."""
        ...


def reduced(size: Size, factor: int) -> Size:
    return -(-size[0] // factor), -(-size[1] // factor)


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, of a picture whose `info` has the metadata; else XMP's; or 1."""
    try:
        # The class's own method: PNG's would decode the picture to see what comes behind it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def profile(image: Any) -> bytes | None:
    """The colour profile in the `info` of a picture of Pillow's or pillow_heif's."""
    found: bytes | None = image.info.get("icc_profile")
    return found if found and len(found) <= MAX_PROFILE_BYTES else None


def only_first(frame: int) -> None:
    if frame:
        raise no_frame(frame)


def no_frame(frame: int) -> ImageFrameMissing:
    return ImageFrameMissing(f"the image has no frame {frame + 1}")


def truncated() -> InvalidImage:
    return InvalidImage("the image is truncated")


def damaged() -> InvalidImage:
    return InvalidImage("the image is damaged and cannot be decoded")

"""Pictures of more than eight bits a sample, brought to eight.

Pillow's own conversion clips them, which makes most of them white.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def eight_bits(image: Image.Image, bits: int = 16, white_is_zero: bool = False) -> Image.Image:
    """The same picture with eight bits a sample, in a mode that Pillow converts to RGB.

    16-bit grey keeps its upper 8 of `bits`, as Pillow's 16-bit RGB does. 32-bit grey is taken as it
    is if it fits into 8 or 16 bits, floats if they fit into 0..1 or 0..255; else the range from the
    least to the greatest value becomes 0..255. Values that are not finite count as the nearest that
    is, or as the least. `white_is_zero` says that the greatest value of these is black.
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
    """The upper 8 of `bits`, without another array of 16."""
    upper = np.empty(values.shape, np.uint8)
    np.right_shift(values, bits - 8, out=upper, casting="unsafe")
    return upper


def _transparent(grey: Image.Image, hidden: npt.NDArray[np.bool_]) -> Image.Image:
    alpha = Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255)))
    return Image.merge("LA", (grey, alpha))


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 of int32 or float32."""
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

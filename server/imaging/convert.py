"""Converts a stored picture to what a screen shows: 8-bit sRGB on a background, upright.

Pillow keeps RGB in four bytes a pixel. Converting to that layout and back takes a third as long as
decoding a JPEG, so RGB pictures stay arrays: see `ArrayImage`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.imaging.codecs.base import Indexed, Pixels, Stored, bands, by_bands, opencv
from server.imaging.profiles import change_of, writable

RGB = tuple[int, int, int]

_ALPHA = frozenset(("RGBA", "LA", "PA"))
# Errors of rounding spread to the next rows in these modes, so that pictures have no bands there.
_DITHERED = frozenset(("1", "P", "PA"))
# Most memory of converting to another mode than RGB, with the result as an array, in bytes a pixel.
OTHER_MODES_BYTES_PER_PIXEL = 13


class ArrayImage(Image.Image):
    """An RGB picture whose pixels are `pixels`, uint8 (height, width, 3), C-contiguous.

    numpy reads these. When Pillow needs its internal layout, it makes a copy, and from then on only
    that copy is used.
    """

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels: Pixels | None = pixels
        self._mode = "RGB"
        self._size = pixels.shape[1], pixels.shape[0]

    @property
    def im(self) -> Any:
        if self.pixels is not None:
            self._im = Image.frombuffer("RGB", self.size, self.pixels, "raw", "RGB", 0, 1).im
            self.pixels = None
        return super().im

    @im.setter
    def im(self, im: Any) -> None:
        self.pixels = None
        self._im = im

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self.pixels is not None:
            return self.pixels.__array_interface__
        return super().__array_interface__


def pixels_of(image: Image.Image) -> Pixels:
    """The pixels of a one-channel picture: uint8 (height, width). An export by Pillow would hold
    them twice."""
    pixels = np.empty(image.size[::-1], np.uint8)
    for rows, band in bands(image):
        pixels[rows] = np.asarray(band)
    return pixels


# ---------------------------------------------------------------------- colours


def to_mode(
    picture: Stored, profile: bytes | None, mode: str | None, background: RGB
) -> Image.Image:
    """Convert `picture`, whose colours are those of `profile`, to sRGB in Pillow's `mode`.

    If `mode` is None, the picture keeps its mode. With "RGB", `background` is the colour under
    transparent pixels.
    """
    if mode == "RGB":
        return ArrayImage(_rgb(picture, profile, background))
    image = _as_image(picture)
    del picture  # it may take as much memory as the image
    if profile is not None or image.mode == "LAB":
        image = by_bands(image, lambda band: _managed(band, profile))
    if mode in (None, image.mode):  # Pillow would copy it
        return image
    if mode in _DITHERED:
        return image.convert(mode)
    return by_bands(image, lambda band: band.convert(mode))


def array_of(image: Image.Image) -> npt.NDArray[Any]:
    """The pixels as numpy takes them from `image`, without a second copy."""
    if isinstance(image, ArrayImage) or image.mode == "1":
        return np.asarray(image)
    array: npt.NDArray[Any] | None = None
    for rows, band in bands(image):
        part = np.asarray(band)
        if array is None:
            array = np.empty((image.height, *part.shape[1:]), part.dtype)
        array[rows] = part
    assert array is not None
    return array


def _rgb(picture: Stored, profile: bytes | None, background: RGB) -> Pixels:
    """uint8 (height, width, 3)."""
    if isinstance(picture, Image.Image):
        if picture.mode not in ("L", "P"):
            return _converted(picture, profile, background)
        picture = Indexed(pixels_of(picture), _entries(picture))
    if isinstance(picture, Indexed):
        return _looked_up(picture, profile, background)
    if picture.shape[2] == 1:
        greys = Image.frombytes("L", (256, 1), bytes(range(256)))
        return _looked_up(Indexed(picture[:, :, 0], greys), profile, background)
    change = change_of(profile, "RGB")
    if change is not None:
        if change.shaper is None:
            return _converted(_as_image(picture), profile, background)
        picture = change.shaper.applied(picture)
    return picture if picture.shape[2] == 3 else _laid_on(picture, background)


def _looked_up(picture: Indexed, profile: bytes | None, background: RGB) -> Pixels:
    """Convert the 256 colours of the table instead of each pixel."""
    from server.imaging.codecs import kernels

    colours = _converted(picture.entries, profile, background)[0]
    indices = writable(picture.indices)
    if np.array_equal(colours, np.arange(256).repeat(3).reshape(256, 3)):
        cv2 = opencv()
        greys: Pixels = cv2.cvtColor(indices, cv2.COLOR_GRAY2RGB)
        return greys
    pixels = np.empty((*indices.shape, 3), np.uint8)
    kernels.look_up(indices.reshape(-1), colours, pixels.reshape(-1, 3))
    return pixels


def _entries(image: Image.Image) -> Image.Image:
    """The 256 values of an "L" or "P" picture as a picture of 256x1 pixels."""
    entries = image.crop((0, 0, 256, 1))
    entries.frombytes(bytes(range(256)))
    entries.info = image.info
    return entries


def _converted(image: Image.Image, profile: bytes | None, background: RGB) -> Pixels:
    """Convert with Pillow, one band at a time: uint8 (height, width, 3)."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in bands(image):
        band = _managed(band, profile)
        if band.mode in _ALPHA or "transparency" in band.info:
            pixels[rows] = _laid_on(np.asarray(_in_mode(band, "RGBA")), background)
        else:
            pixels[rows] = np.asarray(_in_mode(band, "RGB"))
    return pixels


def _in_mode(image: Image.Image, mode: str | None) -> Image.Image:
    """Convert unless the picture has the mode already: Pillow would copy it even then."""
    return image if mode in (None, image.mode) else image.convert(mode)


def _laid_on(pixels: Pixels, background: RGB) -> Pixels:
    """Lay RGBA pixels, uint8 (height, width, 4), on `background`, rounding as vLLM's loader does.
    Returns uint8 (height, width, 3)."""
    from server.imaging.codecs import kernels

    cv2 = opencv()
    if cv2.extractChannel(pixels, 3).min() == 255:  # opaque everywhere
        opaque: Pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
        return opaque
    flat = np.empty((*pixels.shape[:2], 3), np.uint8)
    under = np.array(background, np.uint8)
    kernels.flatten(writable(pixels).reshape(-1, 4), under, flat.reshape(-1, 3))
    return flat


def _as_image(picture: Stored) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Indexed):
        entries = picture.entries
        indices = np.ascontiguousarray(picture.indices)
        image = Image.frombuffer(
            entries.mode, indices.shape[::-1], indices, "raw", entries.mode, 0, 1
        )
        image.info = entries.info
        image.palette = entries.palette
        return image
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[picture.shape[2]]
    return Image.frombuffer(mode, picture.shape[1::-1], picture, "raw", mode, 0, 1)


def _managed(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB, as RGB or RGBA, if the profile fits the mode and makes a difference."""
    if profile is None and image.mode != "LAB":
        return image
    alpha = None
    if image.mode in _ALPHA or "transparency" in image.info:
        layers = image.convert("RGBA")
        alpha = layers.getchannel("A")
        image = layers.convert("L" if image.mode in ("L", "LA") else "RGB")
    elif image.mode in ("P", "YCbCr"):
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    change = change_of(profile, image.mode)
    if change is not None:
        image = change.applied(image)
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
    return image


# ---------------------------------------------------------------------- orientation

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn `image` upright from the EXIF `orientation`, 1 to 8."""
    if orientation == 1:
        return image
    if isinstance(image, ArrayImage) and image.pixels is not None:
        return ArrayImage(_turned(image.pixels, orientation))
    return image.transpose(_TURNS[orientation])


def _turned(pixels: Any, orientation: int) -> Any:
    """By OpenCV, which is four times as fast as numpy and Pillow."""
    cv2 = opencv()
    if orientation in (2, 4):
        return cv2.flip(pixels, 1 if orientation == 2 else 0)
    if orientation == 5:
        return cv2.transpose(pixels)
    if orientation == 7:
        return cv2.flip(cv2.transpose(pixels), -1)
    turns = {
        3: cv2.ROTATE_180,
        6: cv2.ROTATE_90_CLOCKWISE,
        8: cv2.ROTATE_90_COUNTERCLOCKWISE,
    }
    return cv2.rotate(pixels, turns[orientation])

"""A Pillow picture over an array, so that neither is copied into the other's layout in vain.

Pillow keeps RGB in four bytes a pixel. To go through it costs two copies, which take as long as a
third of a JPEG's decoding.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_BAND_ROWS = 64


class ArrayImage(Image.Image):
    """An RGB picture whose pixels are `pixels`, uint8 (height, width, 3), C-contiguous.

    numpy reads these; Pillow makes its own copy of them when it needs one, and from then on that
    copy counts.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        super().__init__()
        self.pixels: npt.NDArray[np.uint8] | None = pixels
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


def bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """A picture in bands of few rows, each with its place: what becomes of them is small."""
    width, height = image.size
    for top in range(0, height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of a picture of one channel: uint8 (height, width). Pillow would hold them twice
    to export them."""
    pixels = np.empty(image.size[::-1], np.uint8)
    for rows, band in bands(image):
        pixels[rows] = np.asarray(band)
    return pixels

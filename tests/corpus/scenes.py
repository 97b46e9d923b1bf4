"""The pictures in the cases."""

import functools

import numpy as np
from PIL import Image

from tests.corpus.cases import Color, Expectation, Size, seen
from tests.pictures import shape

RED: Color = (224, 32, 32)
GREEN: Color = (32, 192, 32)
BLUE: Color = (32, 32, 224)
YELLOW: Color = (240, 224, 32)
WHITE: Color = (255, 255, 255)

# Sides are multiples of 16, so that subsampled chroma ends where a quadrant does.
SIZE: Size = (96, 64)
CORNERS = (RED, GREEN, BLUE, YELLOW)
PALETTE = bytes(channel for color in CORNERS for channel in color)


@functools.cache
def indices(size: Size = SIZE) -> np.ndarray:
    """The quadrant of each pixel, 0 to 3: uint8 (height, width)."""
    width, height = size
    rows = np.arange(height)[:, None] >= height // 2
    columns = np.arange(width)[None] >= width // 2
    return (2 * rows + columns).astype(np.uint8)


@functools.cache
def quadrants(size: Size = SIZE) -> Image.Image:
    """Four quadrants: red, green, blue, yellow."""
    return Image.fromarray(np.array(CORNERS, np.uint8)[indices(size)])


def paletted(size: Size = SIZE) -> Image.Image:
    image = Image.fromarray(indices(size))
    image.putpalette(PALETTE)
    return image


def stored(orientation: int) -> Image.Image:
    """The quadrants as a camera stores them with EXIF `orientation`."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return quadrants().transpose(undo[orientation]) if orientation in undo else quadrants()


def upright(tolerance: int = 24) -> Expectation:
    """Expects the upright quadrants."""
    return seen(CORNERS, SIZE, tolerance)


@functools.cache
def noise(size: Size = SIZE) -> Image.Image:
    """Noise, which compresses badly, so that damage to its file hits pixels."""
    random = np.random.default_rng(0)
    width, height = size
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


@functools.cache
def circle(color: str = "red") -> Image.Image:
    """A scene that the embedded model names "a red circle"."""
    return shape(color)

"""Turning a picture as EXIF says."""

from typing import Any

from PIL import Image

from server.imaging.array_image import ArrayImage
from server.imaging.opencv import opencv

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
    """`image` turned from EXIF's `orientation`, 1 to 8."""
    if orientation == 1:
        return image
    if isinstance(image, ArrayImage) and image.pixels is not None:
        return ArrayImage(_turned(image.pixels, orientation))
    return image.transpose(_TURNS[orientation])


def _turned(pixels: Any, orientation: int) -> Any:
    """By OpenCV, which is four times as fast as numpy and Pillow at it."""
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

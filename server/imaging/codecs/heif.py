"""HEIF (HEIC) by libheif, which also turns and crops the picture, and AVIF by Pillow."""

import io
from typing import Any

import numpy as np
from PIL import AvifImagePlugin, Image

from server.imaging.codecs.base import (
    NO_REDUCTIONS,
    Pixels,
    Stored,
    damaged,
    eight_bits,
    only_first,
    profile,
    truncated,
)
from server.imaging.codecs.pillow import FRAMES_BYTES_PER_PIXEL, PillowSource
from server.imaging.sizing import Size

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each process decodes one picture

# Files have about four.
_MAX_BOXES = 1000


class HeifSource:
    """The primary picture; 10 and 12 bits become 8."""

    reductions = NO_REDUCTIONS
    orientation = 1
    # libheif's planes have up to 12 bits and alpha.
    bytes_per_pixel = 14

    def __init__(self, data: bytes, frame: int) -> None:
        import pillow_heif

        only_first(frame)
        _check_boxes(data)
        options = pillow_heif.options
        options.DECODE_THREADS = 1  # each process decodes one picture
        options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
        opened = pillow_heif.open_heif(io.BytesIO(data))
        self._image: Any = opened[opened.primary_index]
        self.size: Size = self._image.size
        self.profile = profile(self._image)

    def load(self, factor: int) -> Stored:
        image = self._image
        image.load()
        if image.size != self.size or not image.info["primary"]:
            raise damaged()
        if image.mode not in ("RGB", "RGBA"):
            shown: Image.Image = image.to_pillow()
            return eight_bits(shown)
        pixels: Pixels = np.asarray(image)
        return pixels


class AvifSource(PillowSource):
    """A picture, or a frame of a sequence."""

    def __init__(self, data: bytes, frame: int) -> None:
        _check_boxes(data)
        super().__init__(data, frame, "AVIF")

    def move_to(self, frame: int) -> None:
        """Select another frame. Raises ImageFrameMissing."""
        super().move_to(frame)
        # libavif's planes have up to 12 bits and alpha; its RGBA and Pillow's come in addition.
        self.bytes_per_pixel = FRAMES_BYTES_PER_PIXEL


def _check_boxes(data: bytes) -> None:
    """Check by the outermost boxes that the file is complete.

    Raises:
        InvalidImage: a box ends beyond the data, or has an impossible size.
    """
    at = 0
    for _ in range(_MAX_BOXES):
        if at == len(data):
            return
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # the box extends to the end of the file
            return
        if at + 8 > len(data) or at + size > len(data):
            raise truncated()
        if size < 8:
            raise damaged()
        at += size
    raise damaged()

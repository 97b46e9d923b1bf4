"""HEIF (HEIC) by libheif, which turns and crops the picture itself."""

import io
from typing import Any

import numpy as np
from PIL import Image

from server.imaging.codecs.base import NO_REDUCTIONS, Pixels, Stored, damaged, only_first, profile
from server.imaging.codecs.boxes import check_boxes
from server.imaging.codecs.depth import eight_bits
from server.imaging.sizing import Size


class HeifSource:
    """The primary picture; 10 and 12 bits become 8."""

    reductions = NO_REDUCTIONS
    orientation = 1

    def __init__(self, data: bytes, frame: int) -> None:
        import pillow_heif

        only_first(frame)
        check_boxes(data)
        options = pillow_heif.options
        options.DECODE_THREADS = 1  # one picture a process
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

"""Large pictures through libvips, which shrinks them while it reads them.

It is imported on first use: its threads would not survive the fork that makes a worker, and most
workers never need it.
"""

import functools
from typing import Any

import numpy as np

from server.imaging.codecs.base import Pixels, damaged, reduced
from server.imaging.sizing import Size


@functools.cache
def _library() -> Any:
    import pyvips

    pyvips.vips_lib.vips_concurrency_set(1)  # one picture a process
    pyvips.cache_set_max(0)
    pyvips.block_untrusted_set(True)  # our readers are named below; they must not call others
    return pyvips


def load(reader: str, data: bytes, size: Size, factor: int) -> Pixels:
    """uint8 (height, width, channels) of a picture of `size` with 8 bits, its sides divided by
    `factor`. `reader` is one of "pngload", "tiffload" and "webpload".

    Raises:
        InvalidImage: truncated or damaged.
    """
    vips = _library()
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
    """Exactly `width` x `height`: where they do not divide the sides, means over whole pixels would
    shift the picture. The colours of transparent pixels do not matter."""
    across, down = width / image.width, height / image.height
    if not image.hasalpha():
        return image.resize(across, vscale=down, kernel="cubic")
    premultiplied = image.premultiply().resize(across, vscale=down, kernel="cubic")
    return premultiplied.unpremultiply().rint().cast("uchar")

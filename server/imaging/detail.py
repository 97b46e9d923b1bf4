"""Where a picture has detail: text, edges, drawings. Used in image workers only.

    at most 1024 pixels wide or high -> pixels with contrast, or unlike the background -> blocks

Contrast is that of 3 x 3 pixels (a morphological gradient of their grey). It must exceed a level
that is visible at all, and several times the median, which is the contrast of the background's own
pattern. Where the median itself is visible, most of the picture is pattern: all of it is detail.
The background is the median colour: soft photos have hardly any contrast, but other colours. Pixels
that are near to each other make one block.
"""

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.imaging.codecs.base import opencv
from server.imaging.sizing import Size

LONGEST = 1024
"""Pixels of the longer side at which detail is looked for."""

MAX_BLOCKS = 32
# Grey levels of 255, and multiples of the median.
_LEAST_CONTRAST, _NOISE_FACTOR = 32, 3
# Every so many pixels, in both directions, are looked at for the colour of the background.
_SAMPLED = 4
# Blocks grow together over gaps of this share of the longer side.
_GAP = 0.02
# Fewer pixels are specks of dust.
_FEWEST_PIXELS = 12
# A frame lies within this share of the sides from the edges.
_FRAME_BAND = 0.06

Pixels = npt.NDArray[np.uint8]


def looked_at(size: Size) -> Size:
    """The (width, height) at which a picture of `size` is looked at."""
    scale = min(1.0, LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def blocks(image: Image.Image) -> npt.NDArray[np.int32]:
    """The blocks with detail, at most `MAX_BLOCKS`: int32 (blocks, 4), left, top, right, bottom in
    pixels of `image`. Specks are none, nor is a thin frame along the edges."""
    mask = _seen(np.asarray(image.convert("RGB")))
    gap = max(image.size) * _GAP
    while len(found := _boxes(mask, *_grown(mask, max(3, math.ceil(gap))))) > MAX_BLOCKS:
        gap *= 2
    return np.array(found, np.int32).reshape(-1, 4)


def _seen(pixels: Pixels) -> Pixels:
    """1 where there is detail, 0 elsewhere."""
    cv2 = opencv()
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    contrast = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    pattern = float(np.median(contrast[::2, ::2]))
    if pattern > _LEAST_CONTRAST:
        return np.ones_like(grey)
    level = max(_LEAST_CONTRAST, _NOISE_FACTOR * pattern)
    sample = pixels[::_SAMPLED, ::_SAMPLED].reshape(-1, 3)
    behind = np.median(sample, axis=0)
    alike = cv2.inRange(pixels, np.maximum(behind - level, 0), np.minimum(behind + level, 255))
    seen: Pixels = ((contrast > level) | (alike == 0)).astype(np.uint8)
    return seen


def _grown(mask: Pixels, gap: int) -> tuple[int, npt.NDArray[np.int32]]:
    """The number of blocks, with the one of all other pixels, and the block of each pixel."""
    cv2 = opencv()
    grown = cv2.dilate(mask, np.ones((gap | 1, gap | 1), np.uint8))
    count, labels = cv2.connectedComponents(grown, connectivity=8)
    return count, labels


def _boxes(mask: Pixels, count: int, labels: npt.NDArray[np.int32]) -> list[list[int]]:
    rows, columns = np.nonzero(mask)
    owners = labels[rows, columns]
    order = np.argsort(owners, kind="stable")
    rows, columns, owners = rows[order], columns[order], owners[order]
    starts = np.searchsorted(owners, np.arange(1, count + 1))
    found = []
    for start, end in itertools.pairwise(starts):
        down, across = rows[start:end], columns[start:end]
        if len(down) < _FEWEST_PIXELS or _is_frame(down, across, mask.shape):
            continue
        ends = int(across.max()) + 1, int(down.max()) + 1
        found.append([int(across.min()), int(down.min()), *ends])
    return found


def _is_frame(rows: Any, columns: Any, shape: tuple[int, ...]) -> bool:
    """Whether pixels lie all around the picture, and nowhere but near its edges."""
    height, width = shape
    across, down = width * _FRAME_BAND, height * _FRAME_BAND
    is_inside = (
        (rows >= down) & (rows < height - down) & (columns >= across) & (columns < width - across)
    )
    return bool(
        rows.min() < down
        and rows.max() >= height - down
        and columns.min() < across
        and columns.max() >= width - across
        and not is_inside.any()
    )

"""Pixtral and Mistral 3 in the Hugging Face format: native resolution with row breaks.

A picture whose longer side exceeds `longest_edge` is shrunk to it; then both sides are rounded up
to `patch` (16 pixels; 28 for Mistral 3, which merges 2 x 2 patches of 14), and each square is a
token. The prompt has one more token a row: [IMG_BREAK], the last one [IMG_END].

A cap is a smaller `longest_edge`. vLLM counts with the model's own value whatever the options
say, so it is met by resizing the picture to whole squares, which the processor leaves alone.

`detail: low` is 256 tokens: 256 x 256 pixels for Pixtral, 448 x 448 for Mistral 3.
"""

import bisect
import math
from dataclasses import dataclass

from server.errors import ImageAspectRatio
from server.imaging.sizing import Size
from server.imaging.tokens.plan import ImagePlan, refuse, whole

_LOW = 256


@dataclass(frozen=True)
class PixtralTokens:
    patch: int
    longest_edge: int

    family = "pixtral"
    least = 1

    @property
    def most(self) -> int:
        return math.ceil(self.longest_edge / self.patch) ** 2

    @property
    def low(self) -> int:
        return min(_LOW, self.most)

    @property
    def high(self) -> int:
        return self.most

    def fewest(self, width: int, height: int) -> int:
        self._natural(width, height)
        return self.least

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        size = self._natural(width, height)
        resize = None
        if cap is not None and self._tokens(size) > cap:
            if cap < self.least:
                raise refuse(self.least, cap)
            size = self._within(width, height, cap)
            resize = self._covered(size)
        columns, rows = self._grid(size)
        return ImagePlan(
            columns * rows,
            (columns + 1) * rows,
            self._covered(size),
            whole(width, height),
            resize,
        )

    def _natural(self, width: int, height: int) -> Size:
        size = _fitted(width, height, self.longest_edge)
        if min(size) < 1:
            raise ImageAspectRatio("the image is so thin that the model would see nothing of it")
        return size

    def _within(self, width: int, height: int, cap: int) -> Size:
        """The largest size by the family's rule that is covered by `cap` squares."""

        def size(edge: int) -> Size:
            fitted = _fitted(width, height, edge)
            return max(fitted[0], 1), max(fitted[1], 1)

        edges = range(1, min(self.longest_edge, max(width, height)) + 1)
        fitting = bisect.bisect_right(edges, cap, key=lambda edge: self._tokens(size(edge)))
        return size(edges[fitting - 1])

    def _grid(self, size: Size) -> Size:
        """(columns, rows) of squares that cover a size."""
        return -(-size[0] // self.patch), -(-size[1] // self.patch)

    def _covered(self, size: Size) -> Size:
        columns, rows = self._grid(size)
        return columns * self.patch, rows * self.patch

    def _tokens(self, size: Size) -> int:
        columns, rows = self._grid(size)
        return columns * rows


def _fitted(width: int, height: int, edge: int) -> Size:
    """Shrunk until neither side exceeds `edge`, with the processor's own rounding."""
    ratio = max(width / edge, height / edge)
    if ratio <= 1:
        return width, height
    return math.floor(width / ratio), math.floor(height / ratio)

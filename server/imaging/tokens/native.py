"""Families that keep a picture's native resolution: Qwen2-VL to Qwen3-VL, Pixtral, Mistral 3.

`detail: low` is 256 tokens, and `high` the maximum of the processor.
"""

import bisect
import math
from dataclasses import dataclass, replace

from server.errors import ImageAspectRatio
from server.imaging.sizing import NativeResolution, Size
from server.imaging.tokens.rule import TokenAllocation, View, cap_too_low, whole

_LOW = 256
# Qwen's processor refuses pictures beyond this ratio of their sides.
_MOST_RATIO = 200


# ---------------------------------------------------------------------- Qwen


@dataclass(frozen=True)
class QwenTokens:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

    Sides are rounded to multiples of `factor` (28 or 32 pixels: patches of 14 or 16, merged 2 x 2),
    and each square of `factor` x `factor` pixels is one token.

    A cap acts like a smaller `max_pixels`. It is met by resizing the picture to a size that the
    processor keeps, so that the options do not depend on the picture: for each distinct set of
    options, a worker must check its fused preprocessing. Only a picture below the processor's
    `min_pixels` needs options, and these are always the same.

    256 tokens are 448 x 448 pixels for Qwen2-VL: the lower end of the range that its authors
    recommend (256 to 1280).
    """

    rule: NativeResolution

    family = "qwen_vl"
    least = 1

    @property
    def most(self) -> int:
        squares = self.rule.max_pixels // self.rule.factor**2
        # A strip that is one square high keeps its height even if its area is too large.
        return max(squares, math.isqrt(_MOST_RATIO * squares))

    @property
    def low(self) -> int:
        return min(_LOW, self.most)

    @property
    def high(self) -> int:
        return self.most

    def fewest(self, width: int, height: int) -> int:
        self._target(self.rule, width, height)
        return self.least

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        target = self._target(self.rule, width, height)
        if cap is None or self._tokens(target) <= cap:
            tokens = self._tokens(target)
            return TokenAllocation(tokens, tokens, target, whole(width, height))
        if cap < self.least:
            raise cap_too_low(self.least, cap)
        target = self._within(width, height, cap)
        tokens = self._tokens(target)
        options = {}
        if target[0] * target[1] < self.rule.min_pixels:
            options = {"min_pixels": self.rule.factor**2, "max_pixels": self.rule.max_pixels}
        return TokenAllocation(tokens, tokens, target, whole(width, height), target, options)

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        size, factor = allocation.processed, self.rule.factor
        grid = size[0] // factor, size[1] // factor
        return [View("whole", allocation.region, size, grid, allocation.tokens)]

    def _within(self, width: int, height: int, cap: int) -> Size:
        """A size of at most `cap` tokens that the processor does not change."""
        factor = self.rule.factor
        squares = min(cap, self.rule.max_pixels // factor**2)
        capped = replace(self.rule, min_pixels=factor**2, max_pixels=squares * factor**2)
        columns, rows = (side // factor for side in self._target(capped, width, height))
        # The formula lets a long strip exceed the budget rather than make it less than a square
        # high.
        short = min(columns, rows)
        long = min(max(columns, rows), max(squares // short, 1), _MOST_RATIO * short)
        columns, rows = (long, short) if columns > rows else (short, long)
        return columns * factor, rows * factor

    def _tokens(self, size: Size) -> int:
        return (size[0] // self.rule.factor) * (size[1] // self.rule.factor)

    @staticmethod
    def _target(rule: NativeResolution, width: int, height: int) -> Size:
        target = rule.target(width, height)
        if target is None:
            raise ImageAspectRatio(
                f"one side of the image is more than {_MOST_RATIO} times the other"
            )
        return target


# ---------------------------------------------------------------------- Pixtral


@dataclass(frozen=True)
class PixtralTokens:
    """Pixtral and Mistral 3, in the Hugging Face format and in Mistral's.

    A picture whose longer side exceeds `longest_edge` is shrunk to it; then both sides are rounded
    up to multiples of `patch` (16 pixels; 28 for Mistral 3, which merges 2 x 2 patches of 14), and
    each square is a token. The prompt has one more token for each row: [IMG_BREAK], and [IMG_END]
    for the last one.

    A cap acts like a smaller `longest_edge`. vLLM ignores that option when it counts tokens, so the
    cap is met by resizing the picture to whole squares, which the processor does not change. 256
    tokens are 256 x 256 pixels for Pixtral, 448 x 448 for Mistral 3.

    Sides are rounded down when a picture shrinks (`rounds_down`), but to the nearest pixel, and
    never to none, in Mistral's format (`ImageEncoder` of mistral-common).
    """

    patch: int
    longest_edge: int
    rounds_down: bool = True

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

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        size = self._natural(width, height)
        resize = None
        if cap is not None and self._tokens(size) > cap:
            if cap < self.least:
                raise cap_too_low(self.least, cap)
            size = self._within(width, height, cap)
            resize = self._covered(size)
        columns, rows = self._grid(size)
        return TokenAllocation(
            columns * rows,
            (columns + 1) * rows,
            self._covered(size),
            whole(width, height),
            resize,
        )

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        size = allocation.processed
        return [View("whole", allocation.region, size, self._grid(size), allocation.tokens)]

    def _natural(self, width: int, height: int) -> Size:
        size = self._fitted(width, height, self.longest_edge)
        if min(size) < 1:
            raise ImageAspectRatio("the image is too narrow for the model")
        return size

    def _within(self, width: int, height: int, cap: int) -> Size:
        """The largest size by the family's rule that takes at most `cap` squares."""

        def size(edge: int) -> Size:
            fitted = self._fitted(width, height, edge)
            return max(fitted[0], 1), max(fitted[1], 1)

        edges = range(1, min(self.longest_edge, max(width, height)) + 1)
        fitting = bisect.bisect_right(edges, cap, key=lambda edge: self._tokens(size(edge)))
        return size(edges[fitting - 1])

    def _fitted(self, width: int, height: int, edge: int) -> Size:
        """The size after shrinking so that neither side exceeds `edge`, with the processor's
        rounding."""
        ratio = max(width / edge, height / edge)
        if ratio <= 1:
            return width, height
        if self.rounds_down:
            return math.floor(width / ratio), math.floor(height / ratio)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def _grid(self, size: Size) -> Size:
        """The (columns, rows) of squares that cover a size."""
        return -(-size[0] // self.patch), -(-size[1] // self.patch)

    def _covered(self, size: Size) -> Size:
        columns, rows = self._grid(size)
        return columns * self.patch, rows * self.patch

    def _tokens(self, size: Size) -> int:
        columns, rows = self._grid(size)
        return columns * rows

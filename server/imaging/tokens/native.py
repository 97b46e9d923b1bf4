"""Families that keep a picture's own resolution: Qwen2-VL to Qwen3-VL, Pixtral, Mistral 3.

`detail: low` is 256 tokens, and `high` is the most that the processor takes.
"""

import bisect
import math
from dataclasses import dataclass, replace

from server.errors import ImageAspectRatio
from server.imaging.sizing import NativeResolution, Size
from server.imaging.tokens.rule import TokenAllocation, cap_too_low, whole

_LOW = 256
# Qwen's processor refuses pictures beyond this ratio of their sides.
_MOST_RATIO = 200


# ---------------------------------------------------------------------- Qwen


@dataclass(frozen=True)
class QwenTokens:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

    Sides are rounded to multiples of `factor` (28 or 32 pixels: a patch of 14 or 16, merged 2 x 2),
    and each square of `factor` is a token: (height / 14 x width / 14) / 4.

    A cap is a smaller pixel budget, as the family's own `max_pixels` sets it. It is met by giving
    the processor a picture whose size it then leaves alone, so that no option varies with the
    picture: each distinct set of options costs a worker a check of its fused path. Only a picture
    that has to be smaller than the processor's `min_pixels` needs options, and always the same.

    256 tokens are 448 x 448 pixels for Qwen2-VL: the lower end of the range that the family's
    authors recommend (256 to 1280).
    """

    rule: NativeResolution

    family = "qwen_vl"
    least = 1

    @property
    def most(self) -> int:
        squares = self.rule.max_pixels // self.rule.factor**2
        # A strip one square high keeps that height when its area is too large.
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

    def _within(self, width: int, height: int, cap: int) -> Size:
        """The size for at most `cap` tokens that the processor leaves as it is."""
        factor = self.rule.factor
        squares = min(cap, self.rule.max_pixels // factor**2)
        capped = replace(self.rule, min_pixels=factor**2, max_pixels=squares * factor**2)
        columns, rows = (side // factor for side in self._target(capped, width, height))
        # The formula lets a long strip exceed the budget rather than be less than a square high.
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
    """Pixtral and Mistral 3 in the Hugging Face format.

    A picture whose longer side exceeds `longest_edge` is shrunk to it; then both sides are rounded
    up to `patch` (16 pixels; 28 for Mistral 3, which merges 2 x 2 patches of 14), and each square
    is a token. The prompt has one more token a row: [IMG_BREAK], the last one [IMG_END].

    A cap is a smaller `longest_edge`. vLLM counts with the model's own value whatever the options
    say, so the cap is met by resizing the picture to whole squares, which the processor leaves
    alone. 256 tokens are 256 x 256 pixels for Pixtral, 448 x 448 for Mistral 3.
    """

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

"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: native resolution.

Sides are rounded to multiples of `factor` (28 or 32 pixels: a patch of 14 or 16, merged 2 x 2),
and each square of `factor` is a token: (height / 14 x width / 14) / 4.

A cap is a smaller pixel budget, as the family's own `max_pixels` sets it. It is met by giving the
processor a picture whose size it then leaves alone, so that no option varies with the picture:
each distinct set of options costs a worker a check of its fused path. Only a picture that has to
be smaller than the processor's `min_pixels` needs options, and always the same ones.

`detail: low` is 256 tokens, 448 x 448 pixels for Qwen2-VL: the lower end of the range that the
family's authors recommend (256 to 1280). `high` is all that the processor takes.
"""

import math
from dataclasses import dataclass, replace

from server.errors import ImageAspectRatio
from server.imaging.sizing import NativeResolution, Size
from server.imaging.tokens.plan import ImagePlan, refuse, whole

_LOW = 256
# The processor refuses pictures beyond this ratio of their sides.
_MOST_RATIO = 200


@dataclass(frozen=True)
class QwenTokens:
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

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        target = self._target(self.rule, width, height)
        if cap is None or self._tokens(target) <= cap:
            tokens = self._tokens(target)
            return ImagePlan(tokens, tokens, target, whole(width, height))
        if cap < self.least:
            raise refuse(self.least, cap)
        target = self._within(width, height, cap)
        tokens = self._tokens(target)
        options = {}
        if target[0] * target[1] < self.rule.min_pixels:
            options = {"min_pixels": self.rule.factor**2, "max_pixels": self.rule.max_pixels}
        return ImagePlan(tokens, tokens, target, whole(width, height), target, options)

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

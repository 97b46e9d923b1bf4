"""Any other model: its tokens are measured on a blank picture, and a cap is met by shrinking.

The search for the largest size within the cap assumes that smaller pictures take fewer tokens, but
every size is measured before it is used.

`detail: low` is 256 tokens where the model can go that low, and `high` is what it takes by itself.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from server.imaging.sizing import Size
from server.imaging.tokens.plan import ImagePlan, refuse, whole

_LOW = 256
_REMEMBERED_SIZES = 4096
# The longer side shrinks by this factor at each step of the coarse search, down to the last one,
# in pixels: below it, no model has anything to see.
_STEP = 0.8
_SMALLEST_SIDE = 16
# The fine search ends when it is this close to the best longer side.
_PRECISION = 0.02


class Count(NamedTuple):
    """`tokens` and `prompt_tokens` as in `ImagePlan`."""

    tokens: int
    prompt_tokens: int


class MeasuredTokens:
    """`count(width, height)` runs the model's processor on a blank picture. That takes as long as
    a real one; results are remembered by size."""

    family = "measured"
    least = 1
    most = None
    low = _LOW
    high = None

    def __init__(self, count: Callable[[int, int], Count]) -> None:
        self._count = functools.lru_cache(maxsize=_REMEMBERED_SIZES)(count)

    def fewest(self, width: int, height: int) -> int:
        sizes = [(width, height), *self._coarse(width, height)]
        return min(self._count(*size).tokens for size in sizes)

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        count = self._count(width, height)
        if cap is None or count.tokens <= cap:
            return ImagePlan(*count, (width, height), whole(width, height))
        size = self._within(width, height, cap)
        return ImagePlan(*self._count(*size), size, whole(width, height), size)

    def _within(self, width: int, height: int, cap: int) -> Size:
        """The largest size found to fit: each that is returned has been measured."""
        too_large = max(width, height)
        for size in self._coarse(width, height):
            if self._count(*size).tokens <= cap:
                break
            too_large = max(size)
        else:
            raise refuse(self.fewest(width, height), cap)
        while too_large - max(size) > max(_PRECISION * too_large, 1):
            tried = _scaled(width, height, (too_large + max(size)) // 2)
            if self._count(*tried).tokens <= cap:
                size = tried
            else:
                too_large = max(tried)
        return size

    @staticmethod
    def _coarse(width: int, height: int) -> list[Size]:
        sizes, side = [], int(max(width, height) * _STEP)
        while side >= _SMALLEST_SIDE:
            sizes.append(_scaled(width, height, side))
            side = int(side * _STEP)
        return sizes


def _scaled(width: int, height: int, side: int) -> Size:
    """The size with its longer side `side`, aspect ratio kept."""
    scale = side / max(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)

"""LLaVA-NeXT and LLaVA-OneVision: a base view, and tiles on the best of a list of grids (AnyRes).

The picture is fitted into the grid that keeps most of its pixels and wastes least, and is cut into
tiles of `tile` pixels with `side` x `side` features each. Features that show only padding are
dropped, a newline token is added to each row, and the `base` features of the base view come first:
LLaVA-NeXT at 336 pixels takes up to 2880 = 5 x 576 tokens plus newlines. LLaVA-OneVision shrinks
the features if their side is more than 1.1 times that of nine tiles.

The model packs the features by the picture's size and its configured grids, so options cannot
choose another grid, but a smaller picture can: one that just fills a grid is put into that grid, or
into a smaller one that also holds it. To meet a cap, the rule tries the size that fills each grid
and takes the one with the most tokens within the cap. The tiles lose no detail, since the picture
is shown in that grid at this size in any case; only the base view is made from the smaller picture.

`detail: low` is the smallest grid possible for the picture: 1176 tokens (LLaVA-NeXT) or 1485
(LLaVA-OneVision) for a square one. `high` is the largest.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from server.imaging.sizing import BestGrid, Size
from server.imaging.tokens.rule import TokenAllocation, View, cap_too_low, square, tile_views, whole

# LLaVA-OneVision shrinks its features from sides `_SHRUNK_FROM` times those of `_SHRUNK_TO_TILES`
# tiles on.
_SHRUNK_TO_TILES = 9
_SHRUNK_FROM = 1.1
_REMEMBERED_PICTURES = 1024


@dataclass(frozen=True)
class AnyResTokens:
    """`rule.grids` are the (height, width) pairs of `image_grid_pinpoints`, in pixels; for the
    other fields see the module."""

    family: str
    rule: BestGrid
    tile: int
    side: int
    base: int
    shrinks: bool = False

    @property
    def least(self) -> int:
        return self.base

    @functools.cached_property
    def most(self) -> int:  # not always a full grid, which may be shrunk
        return self.base + max(
            self._packed(features)
            for rows, columns in map(self._features, self.rule.grids)
            for features in (
                *((seen, columns) for seen in range(rows, 0, -2)),
                *((rows, seen) for seen in range(columns, 0, -2)),
            )
        )

    @property
    def low(self) -> int:
        return self.least

    @property
    def high(self) -> int:
        return self.most

    def fewest(self, width: int, height: int) -> int:
        ways = (self._way(width, height), *_ways(self, width, height))
        return min(way.tokens for way in ways)

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        way = self._way(width, height)
        if cap is None or way.tokens <= cap:
            return self._allocation(way, width, height, None)
        within = [way for way in _ways(self, width, height) if way.tokens <= cap]
        if not within:
            raise cap_too_low(self.fewest(width, height), cap)
        area = width * height
        way = max(within, key=lambda way: (way.area <= area, way.tokens, way.area))
        return self._allocation(way, width, height, way.size)

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        size = allocation.resize or (width, height)
        grid_height, grid_width = grid = self.rule.best(*size)
        content_width, content_height = allocation.processed
        # The picture is in the middle of the grid.
        left, top = (grid_width - content_width) // 2, (grid_height - content_height) // 2
        across, down = width / content_width, height / content_height
        canvas = (
            -left * across,
            -top * down,
            (grid_width - left) * across,
            (grid_height - top) * down,
        )
        tile, fills = (self.tile, self.tile), (self.side, self.side)
        rows, columns = self._shrunk(self._unpadded(self._features(grid), *size))
        tokens = allocation.tokens - self.base
        return [
            View("overview", allocation.region, tile, square(self.base), self.base),
            *tile_views(
                canvas, (grid_width // self.tile, grid_height // self.tile), tile, 0, fills
            ),
            View("joined", allocation.region, allocation.processed, (columns, rows), tokens),
        ]

    def _allocation(
        self, way: "_Way", width: int, height: int, resize: Size | None
    ) -> TokenAllocation:
        content = _fitted(*way.size, self.rule.best(*way.size))
        return TokenAllocation(way.tokens, way.tokens, content, whole(width, height), resize)

    def _way(self, width: int, height: int) -> "_Way":
        """The tokens of a picture of this size."""
        features = self._unpadded(self._features(self.rule.best(width, height)), width, height)
        return _Way((width, height), self.base + self._packed(features))

    def _features(self, grid: Size) -> Size:
        """(rows, columns) of features in a (height, width) grid."""
        return grid[0] // self.tile * self.side, grid[1] // self.tile * self.side

    @staticmethod
    def _unpadded(features: Size, width: int, height: int) -> Size:
        """(rows, columns) of features without padding, with the model's rounding."""
        rows, columns = features
        if width / height > columns / rows:
            seen = int(round(height * (columns / width), 7))
            return rows - 2 * ((rows - seen) // 2), columns
        seen = int(round(width * (rows / height), 7))
        return rows, columns - 2 * ((columns - seen) // 2)

    def _packed(self, features: Size) -> int:
        """The tokens of (rows, columns) of features, including a newline for each row."""
        rows, columns = self._shrunk(features)
        return rows * columns + rows

    def _shrunk(self, features: Size) -> Size:
        rows, columns = features
        if self.shrinks:
            ratio = math.sqrt(rows * columns / (_SHRUNK_TO_TILES * self.side**2))
            if ratio > _SHRUNK_FROM:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return rows, columns


class _Way(NamedTuple):
    """A size to which the picture could be resized, and its tokens at that size."""

    size: Size
    tokens: int

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]


@functools.lru_cache(maxsize=_REMEMBERED_PICTURES)
def _ways(rule: AnyResTokens, width: int, height: int) -> tuple[_Way, ...]:
    sizes = {_fitted(width, height, grid) for grid in rule.rule.grids}
    return tuple(rule._way(*size) for size in sorted(sizes))


def _fitted(width: int, height: int, grid: Size) -> Size:
    """(width, height) of the picture fitted into a (height, width) grid with its aspect ratio kept
    and the processor's rounding."""
    grid_height, grid_width = grid
    if grid_width / width < grid_height / height:
        return grid_width, min(math.ceil(height * (grid_width / width)), grid_height)
    return min(math.ceil(width * (grid_height / height)), grid_width), grid_height

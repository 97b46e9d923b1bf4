"""InternVL 1.5 to 3.5: tiles on the grid nearest to the picture's aspect ratio, and a thumbnail.

The picture is stretched to a grid of at most `most_tiles` tiles (448 pixels, 256 tokens each after
pixel shuffle); more than one tile are followed by a thumbnail of the whole: (tiles + 1) x 256. The
prompt has the start and end of the image around them.

A cap is a lower maximum of tiles, by the family's own option. It is written as the number of tiles
that the grid then has, so that there are few distinct sets of options.

`detail: low` is a single tile, `high` the processor's own maximum.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from server.imaging.sizing import Size
from server.imaging.tokens.plan import JSON, ImagePlan, refuse, whole


@dataclass(frozen=True)
class InternVLTokens:
    """`option` is what the processor calls the maximum of tiles."""

    tile: Size
    tokens_per_tile: int
    least_tiles: int
    most_tiles: int
    thumbnail: bool
    option: str
    frame_tokens: int = 2

    family = "internvl"

    @property
    def least(self) -> int:
        return self.tokens_per_tile

    @property
    def most(self) -> int:
        return self.tokens_per_tile * self._views(max(self.most_tiles, 1))

    @property
    def low(self) -> int:
        return self.least

    @property
    def high(self) -> int:
        return self.most

    def fewest(self, width: int, height: int) -> int:
        return self.least

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        grid = self._grid(width, height, self.most_tiles)
        options: Mapping[str, JSON] = {}
        if cap is not None and self._tokens(grid) > cap:
            if cap < self.least:
                raise refuse(self.least, cap)
            tiles = max(cap // self.tokens_per_tile - self.thumbnail, 1)
            grid = self._grid(width, height, tiles)
            options = {self.option: grid[0] * grid[1]}
        tokens = self._tokens(grid)
        processed = (grid[0] * self.tile[0], grid[1] * self.tile[1])
        return ImagePlan(
            tokens, tokens + self.frame_tokens, processed, whole(width, height), None, options
        )

    def _tokens(self, grid: Size) -> int:
        return self._views(grid[0] * grid[1]) * self.tokens_per_tile

    def _views(self, tiles: int) -> int:
        return tiles + 1 if self.thumbnail and tiles > 1 else tiles

    def _grid(self, width: int, height: int, most_tiles: int) -> Size:
        """The (columns, rows) of tiles nearest in aspect ratio. Of equally near ones the larger,
        while the picture has more than half its pixels."""
        best, best_distance = (1, 1), float("inf")
        for columns, rows in _grids(self.least_tiles, most_tiles):
            distance = abs(width / height - columns / rows)
            pixels = self.tile[0] * self.tile[1] * columns * rows
            if distance < best_distance or (
                distance == best_distance and width * height > 0.5 * pixels
            ):
                best, best_distance = (columns, rows), distance
        return best


@functools.lru_cache(maxsize=256)
def _grids(least_tiles: int, most_tiles: int) -> tuple[Size, ...]:
    """All (columns, rows) with so many tiles, fewer tiles first."""
    sides = range(1, most_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides]
    fitting = [grid for grid in grids if least_tiles <= grid[0] * grid[1] <= most_tiles]
    return tuple(sorted(fitting, key=lambda grid: grid[0] * grid[1]))

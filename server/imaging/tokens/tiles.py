"""Families that cut a picture into tiles: InternVL, Idefics3, SmolVLM.

`detail: low` is a single view, and `high` the maximum of the processor.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.errors import ImageAspectRatio
from server.imaging.sizing import Size
from server.imaging.tokens.rule import (
    JSON,
    TokenAllocation,
    View,
    cap_too_low,
    square,
    tile_views,
    whole,
)


@dataclass(frozen=True)
class InternVLTokens:
    """InternVL 1.5 to 3.5: the grid nearest to the picture's aspect ratio, and a thumbnail.

    The picture is stretched to a grid of at most `most_tiles` tiles (448 x 448 pixels, 256 tokens
    each after pixel shuffle). If there are several tiles, a thumbnail of the whole picture follows:
    (tiles + 1) x 256 tokens. The prompt has `frame_tokens` more, for the start and end of the
    image.

    A cap is a lower maximum of tiles, set by the processor option `option`. Its value is the number
    of tiles of the grid, which keeps the number of distinct option sets small.
    """

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

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        grid = self._grid(width, height, self.most_tiles)
        options: Mapping[str, JSON] = {}
        if cap is not None and self._tokens(grid) > cap:
            if cap < self.least:
                raise cap_too_low(self.least, cap)
            tiles = max(cap // self.tokens_per_tile - self.thumbnail, 1)
            grid = self._grid(width, height, tiles)
            options = {self.option: grid[0] * grid[1]}
        tokens = self._tokens(grid)
        processed = (grid[0] * self.tile[0], grid[1] * self.tile[1])
        return TokenAllocation(
            tokens, tokens + self.frame_tokens, processed, whole(width, height), None, options
        )

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        return _views(allocation, self.tile, self.tokens_per_tile, self.thumbnail)

    def _tokens(self, grid: Size) -> int:
        return self._views(grid[0] * grid[1]) * self.tokens_per_tile

    def _views(self, tiles: int) -> int:
        return tiles + 1 if self.thumbnail and tiles > 1 else tiles

    def _grid(self, width: int, height: int, most_tiles: int) -> Size:
        """The (columns, rows) of tiles with the nearest aspect ratio. Of two equally near grids,
        the larger wins if the picture has more than half its pixels."""
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
    """All (columns, rows) with `least_tiles` to `most_tiles` tiles, fewer tiles first."""
    sides = range(1, most_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides]
    fitting = [grid for grid in grids if least_tiles <= grid[0] * grid[1] <= most_tiles]
    return tuple(sorted(fitting, key=lambda grid: grid[0] * grid[1]))


def _views(allocation: TokenAllocation, tile: Size, tokens: int, overview: bool) -> list[View]:
    """Tiles that fill the canvas and, if there are several, the `overview`."""
    grid = allocation.processed[0] // tile[0], allocation.processed[1] // tile[1]
    fills = square(tokens)
    if grid == (1, 1):
        return [View("whole", allocation.region, tile, fills, tokens)]
    found = tile_views(allocation.region, grid, tile, tokens, fills)
    if overview:
        found.append(View("overview", allocation.region, tile, fills, tokens))
    return found


# The longest side that Idefics3's processor makes (MAX_IMAGE_SIZE in transformers).
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class IdeficsTokens:
    """Idefics3 and SmolVLM: tiles row by row, then a global view of the whole picture.

    The longer side is resized to `longest_edge`, up or down, and both sides are stretched to whole
    tiles; if there are several tiles, a global view follows. A tile has (side / patch / shuffle)^2
    tokens: 364 / 14 / 2 -> 169 for Idefics3, 512 / 16 / 4 -> 64 for SmolVLM. The prompt names the
    row and column of each tile: `prompt_tokens(rows, columns)` is the length of the placeholder,
    with (0, 0) for a single view; it depends on how the tokenizer joins tags and line breaks.

    Resizing the picture does not change the number of tiles. A cap is a smaller `longest_edge`, in
    whole tiles; at one tile, only the global view is left.
    """

    tile: int
    longest_edge: int
    tokens_per_tile: int
    prompt_tokens: Callable[[int, int], int]

    family = "idefics3"

    @property
    def least(self) -> int:
        return self.tokens_per_tile

    @property
    def most(self) -> int:
        side = math.ceil(min(self.longest_edge, _MOST_PIXELS) / self.tile)
        return self._tokens((side, side) if side > 1 else (0, 0))

    @property
    def low(self) -> int:
        return self.least

    @property
    def high(self) -> int:
        return self.most

    def fewest(self, width: int, height: int) -> int:
        self._grid(width, height, self.longest_edge)
        return self.least

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        grid = self._grid(width, height, self.longest_edge)
        options: Mapping[str, JSON] = {}
        if cap is not None and self._tokens(grid) > cap:
            if cap < self.least:
                raise cap_too_low(self.least, cap)
            edge = self._edge_within(width, height, cap)
            grid = self._grid(width, height, edge)
            options = {"size": {"longest_edge": edge}}
        rows, columns = grid
        return TokenAllocation(
            self._tokens(grid),
            self.prompt_tokens(rows, columns),
            (max(columns, 1) * self.tile, max(rows, 1) * self.tile),
            whole(width, height),
            None,
            options,
        )

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        return _views(allocation, (self.tile, self.tile), self.tokens_per_tile, True)

    def _edge_within(self, width: int, height: int, cap: int) -> int:
        for tiles in range(math.ceil(self.longest_edge / self.tile) - 1, 1, -1):
            if self._tokens(self._grid(width, height, tiles * self.tile)) <= cap:
                return tiles * self.tile
        return self.tile

    def _tokens(self, grid: Size) -> int:
        return (grid[0] * grid[1] + 1) * self.tokens_per_tile

    def _grid(self, width: int, height: int, longest_edge: int) -> Size:
        """(rows, columns) of tiles; (0, 0) if there is only the global view. For some values of
        `longest_edge`, the processor rounds a width of one pixel down to zero and fails."""
        width, height = _longest_edge(width, height, longest_edge)
        if height > width and not int(height * (width / height)):
            raise ImageAspectRatio("the image is too narrow for the model")
        rows, columns = math.ceil(height / self.tile), math.ceil(width / self.tile)
        return (rows, columns) if rows * columns > 1 else (0, 0)


def _longest_edge(width: int, height: int, edge: int) -> Size:
    """The size after the longer side was resized to `edge`, with the processor's rounding."""
    aspect = width / height
    if width >= height:
        width, height = edge, int(edge / aspect)
        height += height % 2
    else:
        width, height = int(edge * aspect), edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > _MOST_PIXELS:
        width, height = _MOST_PIXELS, int(_MOST_PIXELS / aspect)
    elif height > width and height > _MOST_PIXELS:
        width, height = int(_MOST_PIXELS * aspect), _MOST_PIXELS
    return max(width, 1), max(height, 1)

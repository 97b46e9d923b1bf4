"""Idefics3 and SmolVLM: tiles row by row, then the whole picture in one more.

The longer side becomes `longest_edge` whatever it was, both sides are stretched up to whole tiles,
and more than one tile are followed by a global view. A tile is (side / patch / shuffle) squared
tokens: 364 / 14 / 2 -> 169 for Idefics3, 512 / 16 / 4 -> 64 for SmolVLM. The prompt names the row
and column of each tile.

Resizing the picture changes nothing here. A cap is a smaller `longest_edge`, in whole tiles; at
one tile, only the global view is left, which is `detail: low`. `high` is the processor's own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.errors import ImageAspectRatio
from server.imaging.sizing import Size
from server.imaging.tokens.plan import JSON, ImagePlan, refuse, whole

# The processor never makes a side longer than this (transformers, MAX_IMAGE_SIZE).
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class IdeficsTokens:
    """`prompt_tokens(rows, columns)` is the length of the placeholder, of a single view for
    (0, 0); it depends on how the tokenizer joins tags and line breaks."""

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

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        grid = self._grid(width, height, self.longest_edge)
        options: Mapping[str, JSON] = {}
        if cap is not None and self._tokens(grid) > cap:
            if cap < self.least:
                raise refuse(self.least, cap)
            edge = self._edge_within(width, height, cap)
            grid = self._grid(width, height, edge)
            options = {"size": {"longest_edge": edge}}
        rows, columns = grid
        return ImagePlan(
            self._tokens(grid),
            self.prompt_tokens(rows, columns),
            (max(columns, 1) * self.tile, max(rows, 1) * self.tile),
            whole(width, height),
            None,
            options,
        )

    def _edge_within(self, width: int, height: int, cap: int) -> int:
        for tiles in range(math.ceil(self.longest_edge / self.tile) - 1, 1, -1):
            if self._tokens(self._grid(width, height, tiles * self.tile)) <= cap:
                return tiles * self.tile
        return self.tile

    def _tokens(self, grid: Size) -> int:
        return (grid[0] * grid[1] + 1) * self.tokens_per_tile

    def _grid(self, width: int, height: int, longest_edge: int) -> Size:
        """(rows, columns) of tiles; (0, 0) if there is only the global view. One pixel of width
        is rounded away by the processor at some values of `longest_edge`, and then it fails."""
        width, height = _longest_edge(width, height, longest_edge)
        if height > width and not int(height * (width / height)):
            raise ImageAspectRatio("the image is so thin that nothing is left of it")
        rows, columns = math.ceil(height / self.tile), math.ceil(width / self.tile)
        return (rows, columns) if rows * columns > 1 else (0, 0)


def _longest_edge(width: int, height: int, edge: int) -> Size:
    """The size after the longer side has become `edge`; rounded as the processor rounds."""
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

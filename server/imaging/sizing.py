"""How far decoding may shrink a picture so that the processor still only shrinks it further.

Pure arithmetic on widths and heights in pixels. For an upright picture of `width` x `height`, a
rule gives the size that the decoded picture must cover, so that no detail is lost that the
processor would have kept. None means that the whole picture must be decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# libjpeg decodes at 1/1, 1/2, 1/4 and 1/8 straight from the DCT coefficients.
JPEG_SCALES = (8, 4, 2)

Size = tuple[int, int]


class ResizeRule(Protocol):
    """How one family's image processor changes the size of a picture."""

    def target(self, width: int, height: int) -> Size | None:
        """The (width, height) to cover; None for the whole picture."""
        ...


@dataclass(frozen=True)
class NativeResolution:
    """Qwen2-VL to Qwen3-VL: sides become multiples of `factor`, the area stays in a range.

    The formula is `smart_resize` of the Qwen2-VL image processor (transformers).
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def target(self, width: int, height: int) -> Size | None:
        if max(width, height) > 200 * min(width, height):
            return None  # the processor itself refuses it
        w = round(width / self.factor) * self.factor
        h = round(height / self.factor) * self.factor
        if w * h > self.max_pixels:
            beta = math.sqrt(width * height / self.max_pixels)
            h = max(self.factor, math.floor(height / beta / self.factor) * self.factor)
            w = max(self.factor, math.floor(width / beta / self.factor) * self.factor)
        elif w * h < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (width * height))
            h = math.ceil(height * beta / self.factor) * self.factor
            w = math.ceil(width * beta / self.factor) * self.factor
        return w, h


@dataclass(frozen=True)
class FixedSize:
    """SigLIP-like encoders: every picture becomes `width` x `height`."""

    width: int
    height: int

    def target(self, width: int, height: int) -> Size | None:
        return self.width, self.height


@dataclass(frozen=True)
class ShortestEdge:
    """CLIP-like encoders: the shorter side becomes `edge`, then the centre is cropped."""

    edge: int

    def target(self, width: int, height: int) -> Size | None:
        scale = self.edge / min(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)


@dataclass(frozen=True)
class LongestEdge:
    """Idefics3-like tiling: the longer side becomes `edge`, then tiles are cut."""

    edge: int

    def target(self, width: int, height: int) -> Size | None:
        scale = self.edge / max(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)


@dataclass(frozen=True)
class BestGrid:
    """LLaVA-NeXT AnyRes: the picture is fitted into the grid that keeps most and wastes least.

    `grids` are (height, width) pairs as in `image_grid_pinpoints`.
    """

    grids: tuple[Size, ...]

    def best(self, width: int, height: int) -> Size:
        """The grid for a picture, as (height, width)."""

        def rank(grid: Size) -> tuple[int, int]:
            grid_height, grid_width = grid
            scale = min(grid_width / width, grid_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, -(grid_width * grid_height - kept)

        return max(self.grids, key=rank)

    def target(self, width: int, height: int) -> Size | None:
        grid_height, grid_width = self.best(width, height)
        scale = min(grid_width / width, grid_height / height)
        return math.ceil(width * scale), math.ceil(height * scale)


def jpeg_scale(size: Size, target: Size | None) -> int:
    """The largest of 8, 4, 2 and 1 by which the sides of a JPEG can be divided and still cover
    `target`. libjpeg rounds the reduced sides up."""
    if target is None:
        return 1
    for scale in JPEG_SCALES:
        if all(-(-side // scale) >= wanted for side, wanted in zip(size, target, strict=True)):
            return scale
    return 1


def covers(rule: ResizeRule, size: Size, reduced: Size) -> bool:
    """Whether the processor resizes a picture of size `reduced` as it would one of `size`.

    The processor only sees the reduced picture. For a tiling rule, rounding by one pixel may change
    the grid and thus the number of tokens; such a picture is decoded in full.
    """
    if isinstance(rule, BestGrid):
        return rule.best(*size) == rule.best(*reduced)
    if isinstance(rule, LongestEdge):
        wanted, got = rule.target(*size), rule.target(*reduced)
        return wanted == got
    return True


def grids(pinpoints: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    """(height, width) pairs from a configuration's `image_grid_pinpoints`."""
    return tuple((int(height), int(width)) for height, width in pinpoints)

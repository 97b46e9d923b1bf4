"""Families with views of a fixed size: LLaVA-1.5, PaliGemma, BLIP-2, Gemma 3."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.imaging.sizing import Size
from server.imaging.tokens.rule import (
    JSON,
    Region,
    TokenAllocation,
    View,
    cap_too_low,
    square,
    whole,
)


@dataclass(frozen=True)
class FixedTokens:
    """One view: LLaVA-1.5 (576 tokens at 336 pixels and patches of 14), PaliGemma (256, 1024 or
    4096), BLIP-2 (32 learned queries), and tiling families whose tiling is switched off.

    Every picture has the same number of tokens, which `low` and `high` are too; a lower cap cannot
    be met.

    `view` is the encoder's input in pixels. The picture is stretched to it or, if `shortest_edge`
    is set, resized so that its shorter side has that length, and cropped in the centre.
    """

    family: str
    tokens: int
    prompt_tokens: int
    view: Size
    shortest_edge: int | None = None

    @property
    def least(self) -> int:
        return self.tokens

    @property
    def most(self) -> int:
        return self.tokens

    @property
    def low(self) -> int:
        return self.tokens

    @property
    def high(self) -> int:
        return self.tokens

    def fewest(self, width: int, height: int) -> int:
        return self.tokens

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        if cap is not None and cap < self.tokens:
            raise cap_too_low(self.tokens, cap)
        return TokenAllocation(
            self.tokens, self.prompt_tokens, self.view, self._region(width, height)
        )

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        return [View("whole", allocation.region, self.view, square(self.tokens), self.tokens)]

    def _region(self, width: int, height: int) -> Region:
        if self.shortest_edge is None:
            return whole(width, height)
        resized = _shortest_edge(width, height, self.shortest_edge)
        x0, x1 = _cropped(width, resized[0], self.view[0])
        y0, y1 = _cropped(height, resized[1], self.view[1])
        return x0, y0, x1, y1


def _shortest_edge(width: int, height: int, edge: int) -> Size:
    """The size whose centre the processor crops."""
    long = int(edge * max(width, height) / min(width, height))
    return (edge, long) if width <= height else (long, edge)


def _cropped(side: int, resized: int, crop: int) -> tuple[float, float]:
    """The part of `side`, in its pixels, that the central `crop` pixels of `resized` show. If
    `crop` is larger, the processor pads, and the part extends beyond `side`."""
    start = -((crop - resized) // 2) if crop > resized else (resized - crop) // 2
    return start * side / resized, (start + crop) * side / resized


@dataclass(frozen=True)
class PanAndScan:
    """Gemma 3's rule for crops. `min_crop` is in pixels; `min_ratio` is longer side / shorter side
    from which a picture is cropped."""

    min_crop: int
    max_crops: int
    min_ratio: float

    def crops(self, width: int, height: int) -> int:
        """The number of crops along the longer side."""
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio:
            return 0
        crops = min(long // self.min_crop, math.floor(long / short + 0.5))
        crops = min(self.max_crops, max(2, crops))
        return crops if min(math.ceil(long / crops), short) >= self.min_crop else 0


@dataclass(frozen=True)
class GemmaTokens:
    """Gemma 3: one view of 896 x 896 pixels pooled to 256 tokens and, with pan-and-scan, crops of
    elongated pictures with 256 tokens each.

    A cap is met by fewer crops, or none. The prompt has text around the views:
    `prompt_tokens(crops)` is the length of the placeholder. `processed` is the view of the whole
    picture. `detail: low` is that view alone, `high` has all crops.
    """

    view: Size
    tokens_per_view: int
    prompt_tokens: Callable[[int], int]
    scan: PanAndScan

    family = "gemma3"

    @property
    def least(self) -> int:
        return self.tokens_per_view

    @property
    def most(self) -> int:
        return self.tokens_per_view * (1 + self.scan.max_crops)

    @property
    def low(self) -> int:
        return self.least

    @property
    def high(self) -> int:
        return self.most

    def fewest(self, width: int, height: int) -> int:
        return self.least

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        crops = self.scan.crops(width, height)
        options: Mapping[str, JSON] = {}
        if cap is not None and (1 + crops) * self.tokens_per_view > cap:
            if cap < self.least:
                raise cap_too_low(self.least, cap)
            crops, options = self._within(width, height, cap // self.tokens_per_view - 1)
        return TokenAllocation(
            (1 + crops) * self.tokens_per_view,
            self.prompt_tokens(crops),
            self.view,
            whole(width, height),
            None,
            options,
        )

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        tokens = self.tokens_per_view
        crops, grid = allocation.tokens // tokens - 1, square(tokens)
        if not crops:
            return [View("whole", allocation.region, self.view, grid, tokens)]
        found = [View("overview", allocation.region, self.view, grid, tokens)]
        length = math.ceil(max(width, height) / crops)
        for start in range(0, crops * length, length):
            end = start + length
            region = (start, 0, min(end, width), height)
            if height > width:
                region = (0, start, width, min(end, height))
            x0, y0, x1, y1 = map(float, region)
            found.append(View("crop", (x0, y0, x1, y1), self.view, grid, tokens))
        return found

    def _within(self, width: int, height: int, most: int) -> tuple[int, Mapping[str, JSON]]:
        """At most `most` crops, and the options for them; a single crop would repeat the view."""
        if most >= 2:
            scan = PanAndScan(self.scan.min_crop, most, self.scan.min_ratio)
            if crops := scan.crops(width, height):
                return crops, {"pan_and_scan_max_num_crops": most}
        return 0, {"do_pan_and_scan": False}

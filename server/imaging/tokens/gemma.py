"""Gemma 3: one view of 896 pixels pooled to 256 tokens and, with pan-and-scan, crops of a picture
that is much longer than wide, or wider than long, at 256 tokens each.

A cap is a lower maximum of crops, or none. The prompt has text around the views.
`processed` is the view of the whole picture. `detail: low` is that view alone, `high` all crops.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from server.imaging.sizing import Size
from server.imaging.tokens.plan import JSON, ImagePlan, refuse, whole


@dataclass(frozen=True)
class PanAndScan:
    """`min_crop` in pixels; `min_ratio` of the longer to the shorter side."""

    min_crop: int
    max_crops: int
    min_ratio: float

    def crops(self, width: int, height: int) -> int:
        """How many crops the processor makes, along the longer side."""
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio:
            return 0
        crops = min(long // self.min_crop, math.floor(long / short + 0.5))
        crops = min(self.max_crops, max(2, crops))
        return crops if min(math.ceil(long / crops), short) >= self.min_crop else 0


@dataclass(frozen=True)
class GemmaTokens:
    """`prompt_tokens(crops)` is the length of the placeholder."""

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

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        crops = self.scan.crops(width, height)
        options: Mapping[str, JSON] = {}
        if cap is not None and (1 + crops) * self.tokens_per_view > cap:
            if cap < self.least:
                raise refuse(self.least, cap)
            crops, options = self._within(width, height, cap // self.tokens_per_view - 1)
        return ImagePlan(
            (1 + crops) * self.tokens_per_view,
            self.prompt_tokens(crops),
            self.view,
            whole(width, height),
            None,
            options,
        )

    def _within(self, width: int, height: int, most: int) -> tuple[int, Mapping[str, JSON]]:
        """At most so many crops; a single one would only repeat the view."""
        if most >= 2:
            scan = PanAndScan(self.scan.min_crop, most, self.scan.min_ratio)
            if crops := scan.crops(width, height):
                return crops, {"pan_and_scan_max_num_crops": most}
        return 0, {"do_pan_and_scan": False}

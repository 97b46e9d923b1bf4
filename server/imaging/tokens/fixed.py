"""One view of one size: LLaVA-1.5 (576 tokens at 336 pixels and patches of 14), PaliGemma (256,
1024, 4096), BLIP-2 (32 learned queries), and tiling families whose tiling is switched off.

Every picture costs the same, so a cap below it cannot be met; `low` and `high` are that number.
"""

from dataclasses import dataclass

from server.imaging.sizing import Size
from server.imaging.tokens.plan import ImagePlan, Region, refuse, whole


@dataclass(frozen=True)
class FixedTokens:
    """`view` is the encoder's picture in pixels. The picture is stretched to it, or, where
    `shortest_edge` is set, its shorter side becomes that long and the middle is cropped."""

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

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        if cap is not None and cap < self.tokens:
            raise refuse(self.tokens, cap)
        return ImagePlan(self.tokens, self.prompt_tokens, self.view, self._region(width, height))

    def _region(self, width: int, height: int) -> Region:
        if self.shortest_edge is None:
            return whole(width, height)
        resized = _shortest_edge(width, height, self.shortest_edge)
        x0, x1 = _cropped(width, resized[0], self.view[0])
        y0, y1 = _cropped(height, resized[1], self.view[1])
        return x0, y0, x1, y1


def _shortest_edge(width: int, height: int, edge: int) -> Size:
    """The size of which the processor crops the middle."""
    long = int(edge * max(width, height) / min(width, height))
    return (edge, long) if width <= height else (long, edge)


def _cropped(side: int, resized: int, crop: int) -> tuple[float, float]:
    """From where to where one side, in its pixels, is seen in the middle `crop` of `resized`.
    Where `crop` is the larger, the processor pads, and the result reaches outside."""
    start = -((crop - resized) // 2) if crop > resized else (resized - crop) // 2
    return start * side / resized, (start + crop) * side / resized

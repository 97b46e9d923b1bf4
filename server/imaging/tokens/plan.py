"""What one picture costs in tokens, and what must be done so that it costs no more.

A rule answers for an upright picture of `width` x `height` pixels, before anything is decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from server.errors import ImageTokenCap
from server.imaging.sizing import Size

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Region: TypeAlias = tuple[float, float, float, float]
Detail: TypeAlias = Literal["auto", "low", "high"]


@dataclass(frozen=True)
class ImagePlan:
    """How one picture is brought before the model, and its cost."""

    tokens: int
    """Visual tokens that the engine will hold (`PlaceholderRange.get_num_embeds()` in vLLM)."""

    prompt_tokens: int
    """Length of the placeholder in the prompt: `tokens` and the row breaks and tags around them."""

    processed: Size
    """(width, height) in pixels of the picture as the encoder sees it: the canvas that tiles are
    cut from, or what lies in it without its padding; for a single view, the view."""

    region: Region
    """The rectangle (x0, y0, x1, y1) of the original upright picture, in its pixels, that
    `processed` shows: x = x0 + x_processed * (x1 - x0) / processed[0], and so for y. It is the
    whole picture unless the processor crops; where it pads, it reaches outside the picture."""

    resize: Size | None = None
    """The picture must have exactly this size before the processor runs; None: as it is."""

    options: Mapping[str, JSON] = field(default_factory=dict)
    """`mm_processor_kwargs` for this picture alone, over those of the request."""

    def original(self, x: float, y: float) -> tuple[float, float]:
        """The point of the original picture, in its pixels, that is at (x, y) in `processed`."""
        x0, y0, x1, y1 = self.region
        width, height = self.processed
        return x0 + x * (x1 - x0) / width, y0 + y * (y1 - y0) / height


class TokenRule(Protocol):
    """How one family of models counts and caps the tokens of a picture.

    The properties hold for all pictures: `least` is a lower bound, that `fewest` names for one
    picture; `most` is an upper bound without a cap (None: unknown). `low` and `high` are the
    budgets of `detail`; use `detail_cap`.
    """

    @property
    def family(self) -> str: ...

    @property
    def least(self) -> int: ...

    @property
    def most(self) -> int | None: ...

    @property
    def low(self) -> int: ...

    @property
    def high(self) -> int | None: ...

    def fewest(self, width: int, height: int) -> int:
        """The lowest cap that this picture can be planned under."""
        ...

    def plan(self, width: int, height: int, cap: int | None = None) -> ImagePlan:
        """Plan one picture; its `tokens` never exceed `cap`. Without a cap, or within it, the
        picture is left to the processor as it is.

        Raises ImageTokenCap if `cap` is below `fewest`, and ImageAspectRatio if the processor
        does not take a picture of this shape.
        """
        ...


def detail_cap(rule: TokenRule, detail: Detail, width: int, height: int) -> int | None:
    """The cap that OpenAI's `detail` stands for; `low` is always possible for the picture."""
    if detail == "low":
        return max(rule.low, rule.fewest(width, height))
    return rule.high if detail == "high" else None


def whole(width: int, height: int) -> Region:
    return (0.0, 0.0, float(width), float(height))


def refuse(fewest: int, cap: int) -> ImageTokenCap:
    """The error for a picture that cannot be shown in `cap` tokens."""
    return ImageTokenCap(
        f"the model takes at least {fewest} tokens for this image, and the cap is {cap}"
    )

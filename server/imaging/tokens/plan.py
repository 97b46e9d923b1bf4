"""What a picture costs in tokens, how it is kept within a cap, and one budget for several pictures.

A rule answers for an upright picture of `width` x `height` pixels, before anything is decoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from server.errors import ImageTokenCap
from server.imaging.sizing import Size

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Region: TypeAlias = tuple[float, float, float, float]
Detail: TypeAlias = Literal["auto", "low", "high"]


@dataclass(frozen=True)
class ImagePlan:
    """How one picture is shown to the model, and what it costs."""

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

    The properties hold for all pictures: `least` is a lower bound (`fewest` is that of one
    picture); `most` is an upper bound without a cap (None: unknown). `low` and `high` are the
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


# ---------------------------------------------------------------------- one budget for all


@dataclass(frozen=True)
class Claim:
    """What one image asks of the budget.

    It takes `tokens` without a cap and `least` at the lowest possible cap. With fewer than `low`
    tokens (or `tokens`, if that is less) it is of little use. `spend(cap)` are the tokens it takes
    under a cap, never more.
    """

    area: int
    tokens: int
    least: int
    low: int
    spend: Callable[[int], int] = int


def share(budget: int, claims: Sequence[Claim]) -> list[int]:
    """A cap for each image, in order, under which all of them together take at most `budget`.

    Shares are proportional to area; what an image does not need goes to the others. No image is
    brought below its `low` while another has more than that. Equal images get equal caps.

    Raises ImageTokenCap if the images cannot be shown in so few tokens.
    """
    wanted = [claim.tokens for claim in claims]
    if sum(wanted) <= budget:
        return wanted
    useful = [min(claim.tokens, max(claim.low, claim.least)) for claim in claims]
    least = [min(claim.tokens, claim.least) for claim in claims]
    for lower, upper in ((useful, wanted), (least, useful)):
        if _spent(claims, lower) <= budget:
            return _fill(budget, claims, lower, upper)
    raise ImageTokenCap(
        f"the model takes at least {_spent(claims, least)} tokens for these {len(claims)} images, "
        f"and the cap for the request is {budget}"
    )


def _fill(
    budget: int, claims: Sequence[Claim], lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """The caps between `lower` and `upper` of the highest level that fits the budget. At level n,
    the largest image gets n tokens, and the others in proportion to their area."""
    largest = max(claim.area for claim in claims)

    def caps(level: int) -> list[int]:
        return [
            min(most, max(least, level * claim.area // largest))
            for claim, least, most in zip(claims, lower, upper, strict=True)
        ]

    # At level `high` every image has what it wants.
    low, high = 0, max(
        -(-most * largest // claim.area) for claim, most in zip(claims, upper, strict=True)
    ) + 1  # fmt: skip
    while high - low > 1:
        level = (low + high) // 2
        if _spent(claims, caps(level)) <= budget:
            low = level
        else:
            high = level
    return caps(low)


def _spent(claims: Sequence[Claim], caps: Sequence[int]) -> int:
    return sum(claim.spend(cap) for claim, cap in zip(claims, caps, strict=True))


def plan_together(
    rule: TokenRule, sizes: Sequence[Size], budget: int | None, caps: Sequence[int | None]
) -> list[ImagePlan]:
    """Plan the images of a request, given as upright (width, height): each within its own cap,
    and their tokens together within `budget`.

    Raises ImageTokenCap and ImageAspectRatio as `TokenRule.plan` and `share` do.
    """
    plans = [rule.plan(*size, cap) for size, cap in zip(sizes, caps, strict=True)]
    if budget is None or sum(plan.tokens for plan in plans) <= budget:
        return plans
    claims = [_claim(rule, size, plan) for size, plan in zip(sizes, plans, strict=True)]
    return [rule.plan(*size, cap) for size, cap in zip(sizes, share(budget, claims), strict=True)]


def _claim(rule: TokenRule, size: Size, plan: ImagePlan) -> Claim:
    width, height = size

    def spend(cap: int) -> int:
        return rule.plan(width, height, cap).tokens

    return Claim(width * height, plan.tokens, rule.fewest(width, height), rule.low, spend)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of KV cache that a token takes: a key and a value for each KV head of each layer.

    Llama-3.1-8B in fp16: 32 x 8 x 128 x 2 x 2 = 128 KiB, so that 576 tokens take 72 MiB.
    """
    return layers * kv_heads * head_dim * 2 * dtype_bytes

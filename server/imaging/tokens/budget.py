"""One budget of tokens for the images of a request; and what a token costs in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.errors import ImageTokenCap
from server.imaging.sizing import Size
from server.imaging.tokens.plan import ImagePlan, TokenRule


@dataclass(frozen=True)
class Claim:
    """What one image asks of the budget.

    It takes `tokens` if it gets its way, `least` if it must, and below `low`, if `tokens` is not
    below, it is of little use. `spend(cap)` are the tokens it takes under a cap, never more.
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
    """Between `lower` and `upper`, the caps of the highest level that the budget bears. At level
    n, the largest image gets n tokens, and the others in proportion to their area."""
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

"""One budget of tokens for all images and videos of a request."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from server.errors import ImageTokenCap
from server.imaging.sizing import Size
from server.imaging.tokens.rule import TokenAllocation, TokenRule


@dataclass(frozen=True)
class Claim:
    """The claim of one image, or of one video, on the budget.

    It takes `tokens` without a cap and `least` at the lowest possible cap. With fewer than
    min(`low`, `tokens`) it is of little use. `spend(cap)` gives the tokens it takes under a cap,
    never more than the cap. `area` is in pixels.
    """

    area: int
    tokens: int
    least: int
    low: int
    spend: Callable[[int], int] = int


def share(budget: int, claims: Sequence[Claim]) -> list[int]:
    """A cap for each image, in order, so that all of them together take at most `budget` tokens.

    Shares are proportional to area; tokens that an image does not need go to the others. No image
    gets fewer than its `low` while another gets more than its own. Equal images get equal caps.

    Raises:
        ImageTokenCap: the images need more tokens than `budget`.
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
        f"the model needs at least {_spent(claims, least)} tokens for these {len(claims)} images, "
        f"and the cap for the request is {budget}"
    )


def _fill(
    budget: int, claims: Sequence[Claim], lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """The caps between `lower` and `upper` at the highest level that fits the budget. At level n,
    the largest image gets n tokens, and the others in proportion to their area."""
    largest = max(claim.area for claim in claims)

    def caps(level: int) -> list[int]:
        return [
            min(most, max(least, level * claim.area // largest))
            for claim, least, most in zip(claims, lower, upper, strict=True)
        ]

    # At level `high`, every image gets its upper bound.
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


class Asking(NamedTuple):
    """One image or video that shares the budget.

    `allocate(cap)` gives its allocation, which has `tokens`, under a cap; `fewest()` is the lowest
    cap that it can meet; `cap` is its own. `area` and `low` are as in `Claim`.
    """

    area: int
    low: int
    fewest: Callable[[], int]
    allocate: Callable[[int | None], Any]
    cap: int | None


def allocate_all(asking: Sequence[Asking], budget: int | None) -> list[Any]:
    """Allocate tokens to images and videos: each gets at most its cap, and all of them together at
    most `budget`.

    Raises:
        ImageTokenCap: see `share`; and what `allocate` raises.
    """
    allocations = [each.allocate(each.cap) for each in asking]
    if budget is None or sum(allocation.tokens for allocation in allocations) <= budget:
        return allocations
    claims = [
        _claim(each, allocation.tokens)
        for each, allocation in zip(asking, allocations, strict=True)
    ]
    return [each.allocate(cap) for each, cap in zip(asking, share(budget, claims), strict=True)]


def allocate_together(
    rule: TokenRule, sizes: Sequence[Size], budget: int | None, caps: Sequence[int | None]
) -> list[TokenAllocation]:
    """Allocate tokens to images, given as upright (width, height): each image gets at most its cap,
    and all of them together at most `budget`.

    Raises:
        ImageTokenCap, ImageAspectRatio: see `TokenRule.allocate` and `share`.
    """
    return allocate_all(
        [asking(rule, size, cap) for size, cap in zip(sizes, caps, strict=True)], budget
    )


def asking(rule: TokenRule, size: Size, cap: int | None) -> Asking:
    """One image, given as upright (width, height)."""
    width, height = size
    return Asking(
        area=width * height,
        low=rule.low,
        fewest=functools.partial(rule.fewest, width, height),
        allocate=functools.partial(rule.allocate, width, height),
        cap=cap,
    )


def _claim(asking: Asking, tokens: int) -> Claim:
    def spend(cap: int) -> int:
        spent: int = asking.allocate(cap).tokens
        return spent

    return Claim(asking.area, tokens, asking.fewest(), asking.low, spend)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of KV cache for one token: a key and a value for each KV head of each layer.

    Llama-3.1-8B in fp16: 32 x 8 x 128 x 2 x 2 = 128 KiB, so 576 tokens take 72 MiB.
    """
    return layers * kv_heads * head_dim * 2 * dtype_bytes

"""The movements of a robot in the answer of OpenVLA, whose tokens are numbers.

A request asks for tokens with `"return_token_ids": true`, and for as many as an action has
dimensions (`max_tokens`). Formulas: `ActionTokenizer` and `predict_action` of OpenVLA.
"""

from collections.abc import Mapping, Sequence
from typing import Any

VOCABULARY = 32_000
BINS = 256


def actions(
    token_ids: Sequence[int],
    statistics: Mapping[str, Any] | None = None,
    *,
    vocabulary: int = VOCABULARY,
    bins: int = BINS,
) -> list[float]:
    """The numbers that `token_ids` stand for, one for each dimension of the action.

    The last `bins` words of a vocabulary of that size stand for places from 1 down to -1. Padding
    behind the vocabulary does not count: 32,000 of the 32,064 words of openvla-7b.

    `statistics` are those of the robot: `norm_stats[NAME]["action"]` in the model's config.json,
    with `q01`, `q99` and perhaps `mask`. Where the mask is not false, -1 to 1 becomes q01 to q99,
    in the robot's units. Without statistics, all numbers are from -1 to 1.

    Raises:
        ValueError: a token stands for no number, or the statistics are for another number of
            dimensions.
    """
    numbers = [_number(token, vocabulary, bins) for token in token_ids]
    if statistics is None:
        return numbers
    low, high = statistics["q01"], statistics["q99"]
    mask = statistics.get("mask") or [True] * len(low)
    if not len(numbers) == len(low) == len(high) == len(mask):
        raise ValueError(f"an action has {len(low)} dimensions, not {len(numbers)}")
    return [
        0.5 * (number + 1) * (most - least) + least if scaled else number
        for number, least, most, scaled in zip(numbers, low, high, mask, strict=True)
    ]


def _number(token: int, vocabulary: int, bins: int) -> float:
    if not vocabulary - bins <= token < vocabulary:
        raise ValueError(f"token {token} is no action")
    # `bins` edges are the bounds of `bins - 1` intervals, whose middles are meant.
    interval = min(max(vocabulary - token - 1, 0), bins - 2)
    return -1 + (interval + 0.5) * 2 / (bins - 1)

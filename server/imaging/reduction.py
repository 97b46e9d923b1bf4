"""Which parts of a picture the model sees, and with how many tokens, for the policies of `detail`.

"trim" cuts margins off: the model sees the box around all detail. "salient" shows blocks of detail
as crops at their own resolution, after a small view of the whole, where that takes less of the
picture than the box around them. No plan takes more tokens than the whole picture would.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from server.imaging.sizing import Size

Reduction: TypeAlias = Literal["whole", "trim", "salient"]
Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels of the upright picture."""
Tokens: TypeAlias = Callable[[Size], int]
"""The tokens of a picture of this size, with the caps that apply to it."""

MAX_CROPS = 6
# A margin is left around detail: of the longer side, and at least so many pixels.
_MARGIN, _LEAST_MARGIN = 0.006, 8
# Sides are multiples of the pixels that a token covers in most families, so that a small crop is
# not stretched, and not less than two of them.
_STEP = 32
# A picture is trimmed if less than this of its area is left.
_WORTH_TRIMMING = 0.9
# Crops are used if they have less than this of the area of the box around them, and with the view
# of the whole less than this of its tokens, unless it would be shrunk.
_WORTH_CROPPING = 0.7
# A box is shrunk if it has less than this of the tokens for a pixel that crops have.
_SHRUNK = 0.8
# Blocks are merged while that adds no more than this share to their area.
_CHEAP_GROWTH = 0.25
# The view of the whole takes this part of the tokens, within bounds.
_OVERVIEW_PART, _OVERVIEW_LEAST, _OVERVIEW_MOST = 8, 16, 256
_BLANK_TOKENS = 16
_LEAST_CROP_TOKENS = 4


class Shown(NamedTuple):
    """A view of a picture: `box` of it (None: all), with at most `max_tokens` (None: no cap)."""

    box: Box | None
    max_tokens: int | None = None


def plan(
    reduction: Reduction,
    size: Size,
    blocks: Sequence[Box],
    room: int,
    tokens: Tokens | None,
    share: int | None = None,
) -> list[Shown]:
    """The views of a picture of `size`, whose detail is in `blocks`: at most `room`, at least one.
    `tokens` is None for families whose pictures have no such number; they are trimmed at most.
    `share` is the picture's part of a budget, which several views must not exceed together."""
    if reduction == "whole":
        return [Shown(None)]
    if not blocks:
        return [Shown(None, _BLANK_TOKENS if tokens is not None else None)]
    around = _around(blocks)
    fitted = _fitted(around, size)
    if reduction == "salient" and tokens is not None and room > 2:
        crops = [_fitted(box, size) for box in _merged(blocks, min(MAX_CROPS, room - 1), size)]
        if len(crops) > 1 and _areas(crops) < _WORTH_CROPPING * _area(fitted):
            found = _in_share(crops, size, fitted, tokens, share)
            if found is not None:
                return found
    if _area(fitted) >= _WORTH_TRIMMING * size[0] * size[1]:
        return [Shown(None)]
    return [Shown(fitted, tokens(size) if tokens is not None else None)]


def _in_share(
    crops: list[Box], size: Size, fitted: Box, tokens: Tokens, share: int | None
) -> list[Shown] | None:
    """A view of the whole and `crops`; None if the box `fitted` around them is better."""

    def within(of: Size) -> int:
        return tokens(of) if share is None else min(tokens(of), share)

    found = _with_overview(crops, within(size), within)
    return found if found is not None and _are_better(found, fitted, within) else None


def _with_overview(crops: list[Box], budget: int, tokens: Tokens) -> list[Shown] | None:
    """A view of the whole and `crops`, within `budget` tokens; None if that is too little."""
    overview = min(max(budget // _OVERVIEW_PART, _OVERVIEW_LEAST), _OVERVIEW_MOST)
    left = budget - overview
    wanted = [tokens(size_of(box)) for box in crops]
    if sum(wanted) > left:
        total = _areas(crops)
        wanted = [
            min(most, left * _area(box) // total) for box, most in zip(crops, wanted, strict=True)
        ]
    if min(wanted) < _LEAST_CROP_TOKENS:
        return None
    views = [Shown(box, most) for box, most in zip(crops, wanted, strict=True)]
    return [Shown(None, overview), *sorted(views, key=_reading_order)]


def _are_better(views: list[Shown], box: Box, tokens: Tokens) -> bool:
    """Whether views take clearly fewer tokens than `box` alone, or show more pixels for each."""
    crops = [view for view in views if view.box is not None]
    of_crops = sum(view.max_tokens or 0 for view in crops)
    area = _areas(view.box for view in crops if view.box is not None)
    is_shrunk = tokens(size_of(box)) * area < _SHRUNK * of_crops * _area(box)
    return is_shrunk or sum(view.max_tokens or 0 for view in views) < _WORTH_CROPPING * tokens(
        size_of(box)
    )


def _reading_order(view: Shown) -> tuple[int, int]:
    assert view.box is not None
    return view.box[1], view.box[0]


def _merged(blocks: Sequence[Box], most: int, size: Size) -> list[Box]:
    """At most `most` boxes that cover `blocks`, with little more area. Margins count."""
    margin = _margin(size)
    outwards = np.array((-margin, -margin, margin, margin))
    boxes = np.array(blocks, np.int64) + outwards
    while len(boxes) > 1:
        low = np.minimum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.maximum(boxes[:, None, 2:], boxes[None, :, 2:])
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        both = areas[:, None] + areas[None, :]
        growth = np.prod(high - low, axis=2) - both
        np.fill_diagonal(growth, np.iinfo(np.int64).max)
        one, other = np.unravel_index(np.argmin(growth), growth.shape)
        if len(boxes) <= most and growth[one, other] > _CHEAP_GROWTH * both[one, other]:
            break
        merged = np.concatenate((low[one, other], high[one, other]))
        boxes = np.vstack((np.delete(boxes, (one, other), axis=0), merged))
    boxes -= outwards
    return [(left, top, right, bottom) for left, top, right, bottom in boxes.tolist()]


def _around(boxes: Iterable[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _fitted(box: Box, size: Size) -> Box:
    """`box` with a margin, in whole steps where the picture has room."""
    margin = _margin(size)
    left, right = _side(box[0] - margin, box[2] + margin, size[0])
    top, bottom = _side(box[1] - margin, box[3] + margin, size[1])
    return left, top, right, bottom


def _margin(size: Size) -> int:
    return max(_LEAST_MARGIN, round(max(size) * _MARGIN))


def _side(start: int, end: int, most: int) -> tuple[int, int]:
    start, end = max(0, start), min(most, end)
    length = min(most, max(2 * _STEP, -(-(end - start) // _STEP) * _STEP))
    start = max(0, min(start - (length - (end - start)) // 2, most - length))
    return start, start + length


def size_of(box: Box) -> Size:
    """Width and height."""
    return box[2] - box[0], box[3] - box[1]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _areas(boxes: Iterable[Box]) -> int:
    return sum(map(_area, boxes))

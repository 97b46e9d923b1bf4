"""What a picture costs in tokens and how a cap is met: the protocol of all rules, and a fallback.

A rule answers for an upright picture of `width` x `height` pixels, before anything is decoded.
`MeasuredTokens` is the rule for models of no known family.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from server.errors import ImageTokenCap
from server.imaging.sizing import Size

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Region: TypeAlias = tuple[float, float, float, float]
Detail: TypeAlias = Literal["auto", "low", "high"]


class TokenAllocation(msgspec.Struct, frozen=True):
    """How one picture is shown to the model, and what it costs."""

    tokens: int
    """Visual tokens that the engine will hold (`PlaceholderRange.get_num_embeds()` in vLLM)."""

    prompt_tokens: int
    """Length of the placeholder in the prompt: `tokens` plus row breaks and tags."""

    processed: Size
    """(width, height) in pixels of the picture as the encoder sees it: the canvas that tiles are
    cut from, without its padding; for a single view, the view."""

    region: Region
    """The rectangle (x0, y0, x1, y1) of the original upright picture, in its pixels, that
    `processed` shows: x = x0 + x_processed * (x1 - x0) / processed[0], and so for y. It is the
    whole picture unless the processor crops; if it pads, the region extends beyond the picture."""

    resize: Size | None = None
    """The size to resize the picture to before the processor runs; None: keep its size."""

    options: Mapping[str, JSON] = msgspec.field(default_factory=dict)
    """`mm_processor_kwargs` for this picture, which override those of the request."""

    def original(self, x: float, y: float) -> tuple[float, float]:
        """The point of the original picture, in its pixels, that (x, y) in `processed` shows."""
        x0, y0, x1, y1 = self.region
        width, height = self.processed
        return x0 + x * (x1 - x0) / width, y0 + y * (y1 - y0) / height


@dataclass(frozen=True)
class View:
    """One picture that the encoder sees, or the grid that the features of several make.

    Attributes:
        kind: "whole" is the only view; "tile" is a part of the canvas, "overview" the whole picture
            beside tiles or crops, and "crop" an enlarged part. "joined" is no picture: it is the
            grid that the features of all tiles make without their padding.
        region: what it shows, as in `TokenAllocation`.
        size: (width, height) in pixels that the encoder gets.
        grid: (columns, rows) of tokens; None if tokens have no places, as with learned queries.
        tokens: what it takes of `TokenAllocation.tokens`, with the breaks of rows that count there.
    """

    kind: Literal["whole", "tile", "overview", "crop", "joined"]
    region: Region
    size: Size
    grid: Size | None
    tokens: int


class TokenRule(Protocol):
    """How one family of models counts and caps the tokens of a picture.

    The properties hold for all pictures: `least` is a lower bound (`fewest` is the bound for one
    picture), and `most` an upper bound without a cap (None: unknown). `low` and `high` are the
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
        """The lowest cap that this picture can meet."""
        ...

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        """The tokens of one picture, never more than `cap`. A picture that needs no cap to fit is
        not resized.

        Raises:
            ImageTokenCap: `cap` is below `fewest`.
            ImageAspectRatio: the processor does not accept pictures of this shape.
        """
        ...

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        """What the encoder sees of a picture with this allocation, in the order of its tokens;
        empty if that is not known."""
        ...


def detail_cap(rule: TokenRule, detail: Detail, width: int, height: int) -> int | None:
    """The cap that OpenAI's `detail` stands for: never below what the picture can meet."""
    if detail == "low":
        return max(rule.low, rule.fewest(width, height))
    return rule.high if detail == "high" else None


def whole(width: int, height: int) -> Region:
    """The region of the whole picture."""
    return (0.0, 0.0, float(width), float(height))


def square(tokens: int) -> Size | None:
    """The grid of so many tokens in a square; None if they fill none."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def tile_views(
    canvas: Region, grid: Size, tile: Size, tokens: int, fills: Size | None
) -> list[View]:
    """Tiles of `tile` pixels, row by row, in (columns, rows) `grid` over the region `canvas`, with
    `tokens` each in the grid `fills`."""
    (left, top, right, bottom), (columns, rows) = canvas, grid
    width, height = (right - left) / columns, (bottom - top) / rows
    return [
        View(
            "tile",
            (
                left + column * width,
                top + row * height,
                left + (column + 1) * width,
                top + (row + 1) * height,
            ),
            tile,
            fills,
            tokens,
        )
        for row in range(rows)
        for column in range(columns)
    ]


def cap_too_low(fewest: int, cap: int) -> ImageTokenCap:
    """The error for a picture that needs at least `fewest` tokens."""
    return ImageTokenCap(
        f"the model needs at least {fewest} tokens for this image, and the cap is {cap}"
    )


# ---------------------------------------------------------------------- measured tokens

_LOW = 256
_REMEMBERED_SIZES = 4096
# The longer side shrinks by this factor at each step of the coarse search, down to a side, in
# pixels, below which no model can see anything.
_STEP = 0.8
_SMALLEST_SIDE = 16
# The fine search ends when the longer side is within this share of the best one.
_PRECISION = 0.02


class Count(NamedTuple):
    """`tokens` and `prompt_tokens`, as in `TokenAllocation`."""

    tokens: int
    prompt_tokens: int


class MeasuredTokens:
    """For any other model: tokens are measured on a blank picture, and a cap is met by shrinking.

    `count(width, height)` runs the model's processor, which takes as long as for a real picture;
    results are remembered by size. The search for the largest size within the cap assumes that
    smaller pictures take fewer tokens, but every size is measured before it is used.

    `detail: low` is 256 tokens where the model can go that low, and `high` its default number.
    """

    family = "measured"
    least = 1
    most = None
    low = _LOW
    high = None

    def __init__(self, count: Callable[[int, int], Count]) -> None:
        self._count = functools.lru_cache(maxsize=_REMEMBERED_SIZES)(count)

    def fewest(self, width: int, height: int) -> int:
        sizes = [(width, height), *self._coarse(width, height)]
        return min(self._count(*size).tokens for size in sizes)

    def allocate(self, width: int, height: int, cap: int | None = None) -> TokenAllocation:
        count = self._count(width, height)
        if cap is None or count.tokens <= cap:
            return TokenAllocation(*count, (width, height), whole(width, height))
        size = self._within(width, height, cap)
        return TokenAllocation(*self._count(*size), size, whole(width, height), size)

    def views(self, width: int, height: int, allocation: TokenAllocation) -> list[View]:
        return []

    def _within(self, width: int, height: int, cap: int) -> Size:
        """The largest measured size that fits the cap."""
        too_large = max(width, height)
        for size in self._coarse(width, height):
            if self._count(*size).tokens <= cap:
                break
            too_large = max(size)
        else:
            raise cap_too_low(self.fewest(width, height), cap)
        while too_large - max(size) > max(_PRECISION * too_large, 1):
            tried = _scaled(width, height, (too_large + max(size)) // 2)
            if self._count(*tried).tokens <= cap:
                size = tried
            else:
                too_large = max(tried)
        return size

    @staticmethod
    def _coarse(width: int, height: int) -> list[Size]:
        sizes, side = [], int(max(width, height) * _STEP)
        while side >= _SMALLEST_SIDE:
            sizes.append(_scaled(width, height, side))
            side = int(side * _STEP)
        return sizes


def _scaled(width: int, height: int, side: int) -> Size:
    """The size scaled so that its longer side is `side`."""
    scale = side / max(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)

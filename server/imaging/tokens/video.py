"""What a video costs in tokens, and how a cap is met; pure arithmetic.

A rule answers for so many frames of `width` x `height` pixels, before anything is decoded. A cap is
met with fewer pixels in each frame, down to `FLOOR` tokens for a frame (for a pair of frames, where
the model merges two into one), and then with fewer frames.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from server.errors import ImageAspectRatio, ImageTokenCap
from server.imaging.sizing import NativeResolution, Size
from server.imaging.tokens.native import QwenTokens
from server.imaging.tokens.rule import JSON, Count

FLOOR = 64
# Below so many tokens a video is of little use.
_LOW = 256
# Qwen's processor refuses frames beyond this ratio of their sides.
_MOST_RATIO = 200


class VideoAllocation(msgspec.Struct, frozen=True):
    """How one video is shown to the model, and what it costs."""

    tokens: int
    """Visual tokens that the engine will hold (`PlaceholderRange.get_num_embeds()` in vLLM)."""

    frames: int
    """How many frames the processor gets."""

    processed: Size
    """(width, height) in pixels of a frame as the encoder sees it."""

    resize: Size | None = None
    """The size to which frames are resized, bicubically, before the processor runs; None: they
    keep their size."""

    options: Mapping[str, JSON] = msgspec.field(default_factory=dict)
    """`mm_processor_kwargs` for this video, which override those of the request."""

    grid: tuple[int, int, int] | None = None
    """Pairs of frames, rows and columns of patches that the processor makes of the video; None
    where the rule does not tell."""


class VideoRule(Protocol):
    """How one family of models counts and caps the tokens of a video. `least_frames`: of fewer
    frames, the last one is repeated."""

    @property
    def family(self) -> str: ...

    @property
    def least_frames(self) -> int: ...

    @property
    def low(self) -> int: ...

    def fewest(self, frames: int, width: int, height: int) -> int:
        """The lowest cap that this video can meet."""
        ...

    def allocate(
        self, frames: int, width: int, height: int, cap: int | None = None
    ) -> VideoAllocation:
        """The tokens of one video, never more than `cap`, with at most `frames` frames.

        Raises:
            ImageTokenCap: `cap` is below `fewest`.
            ImageAspectRatio: the processor does not accept frames of this shape.
        """
        ...

    def prompt_tokens(self, allocation: VideoAllocation, times: Sequence[float]) -> int:
        """The length of the placeholder in the prompt: `tokens` and the text around them. `times`
        are those of the frames that the processor gets, in seconds, as it computes them."""
        ...


# ---------------------------------------------------------------------- Qwen


@dataclass(frozen=True)
class QwenVideoTokens:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    Two frames make one grid; of an odd number, the last is repeated. Sides are rounded to multiples
    of `factor`, and each square of `factor` x `factor` pixels of a grid is one token. `min_pixels`
    and `max_pixels` are for each frame; `together`: for all frames together (Qwen3-VL).

    `merge`: patches along each side of a token.
    `alike`: frames may be resized to their target before the processor runs, with the same result.
    `time_tokens`: the number of text tokens before each grid, from its time in seconds, which
    Qwen3-VL writes into the prompt with a tag before and after the grid; None: there are none.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    merge: int = 2
    together: bool = False
    alike: bool = True
    time_tokens: Callable[[float], int] | None = None

    family = "qwen_vl"
    low = _LOW

    @property
    def least_frames(self) -> int:
        return 2 if self.together else 1

    def fewest(self, frames: int, width: int, height: int) -> int:
        self._natural(frames, width, height)
        return 1

    def allocate(
        self, frames: int, width: int, height: int, cap: int | None = None
    ) -> VideoAllocation:
        frames = max(frames, self.least_frames)
        size = self._natural(frames, width, height)
        squares, grids = self._squares(size), math.ceil(frames / 2)
        if cap is None or grids * squares <= cap:
            stays = self.alike and self._natural(frames, *size) == size
            resize, grid = size if stays else None, self._grid(frames, size)
            return VideoAllocation(grids * squares, frames, size, resize, grid=grid)
        if cap < 1:
            raise _cap_too_low(1, cap)
        grids = min(grids, max(cap // min(FLOOR, squares), 1))
        frames = min(frames, 2 * grids)
        each = max(1, min(cap // grids, squares, self._most_squares(frames)))
        rule = NativeResolution(self.factor, self.factor**2, squares * self.factor**2)
        size = QwenTokens(rule).allocate(width, height, each).processed
        tokens, options = grids * self._squares(size), self._options(frames, size)
        return VideoAllocation(tokens, frames, size, size, options, self._grid(frames, size))

    def prompt_tokens(self, allocation: VideoAllocation, times: Sequence[float]) -> int:
        if self.time_tokens is None:
            return allocation.tokens
        padded = [*times, *times[-1:]] if len(times) % 2 else times
        pairs = zip(padded[::2], padded[1::2], strict=True)
        stamps = [self.time_tokens((first + second) / 2) for first, second in pairs]
        return allocation.tokens + sum(stamps) + 2 * len(stamps)

    def _grid(self, frames: int, size: Size) -> tuple[int, int, int]:
        columns, rows = (side * self.merge // self.factor for side in size)
        return math.ceil(frames / 2), rows, columns

    def _most_squares(self, frames: int) -> int:
        count = round(frames / 2) * 2 if self.together else 1
        return self.max_pixels // (count * self.factor**2)

    def _squares(self, size: Size) -> int:
        return (size[0] // self.factor) * (size[1] // self.factor)

    def _options(self, frames: int, size: Size) -> Mapping[str, JSON]:
        """What keeps the processor from enlarging frames again."""
        count = round(frames / 2) * 2 if self.together else 1
        if count * size[0] * size[1] >= self.min_pixels:
            return {}
        return {"min_pixels": self.factor**2, "max_pixels": self.max_pixels}

    def _natural(self, frames: int, width: int, height: int) -> Size:
        size: Size | None
        if self.together:
            size = self._natural_together(frames, width, height)
        else:
            rule = NativeResolution(self.factor, self.min_pixels, self.max_pixels)
            size = rule.target(width, height)
        if size is None:
            raise ImageAspectRatio(
                f"one side of the video is more than {_MOST_RATIO} times the other"
            )
        return size

    def _natural_together(self, frames: int, width: int, height: int) -> Size | None:
        """`smart_resize` of the Qwen3-VL video processor (transformers)."""
        factor = self.factor
        if min(width, height) < factor:
            scale = max(factor / height, factor / width)
            width, height = int(width * scale), int(height * scale)
        if max(width, height) > _MOST_RATIO * min(width, height):
            return None
        columns, rows = round(width / factor), round(height / factor)
        pixels = round(frames / 2) * 2 * columns * rows * factor**2
        if pixels > self.max_pixels:
            beta = math.sqrt((frames * height * width) / self.max_pixels)
            rows = max(1, math.floor(height / beta / factor))
            columns = max(1, math.floor(width / beta / factor))
        elif pixels < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (frames * height * width))
            rows = math.ceil(height * beta / factor)
            columns = math.ceil(width * beta / factor)
        return columns * factor, rows * factor


# ---------------------------------------------------------------------- frames of a fixed size


@dataclass(frozen=True)
class FrameTokens:
    """LLaVA-OneVision and InternVL: every frame is stretched to `view` and has `per_frame` tokens;
    all frames together have `extra` more. A cap is met with fewer frames.

    `alike`: as for `QwenVideoTokens`. `text_tokens`: the number of text tokens around so many
    frames.
    """

    family: str
    per_frame: int
    extra: int
    view: Size
    text_tokens: Callable[[int], int]
    alike: bool = True

    least_frames = 1
    low = _LOW

    def fewest(self, frames: int, width: int, height: int) -> int:
        return self.per_frame + self.extra

    def allocate(
        self, frames: int, width: int, height: int, cap: int | None = None
    ) -> VideoAllocation:
        if cap is not None and frames * self.per_frame + self.extra > cap:
            frames = (cap - self.extra) // self.per_frame
            if frames < 1:
                raise _cap_too_low(self.per_frame + self.extra, cap)
        tokens = frames * self.per_frame + self.extra
        return VideoAllocation(tokens, frames, self.view, self.view if self.alike else None)

    def prompt_tokens(self, allocation: VideoAllocation, times: Sequence[float]) -> int:
        return allocation.tokens + self.text_tokens(allocation.frames)


# ---------------------------------------------------------------------- measured tokens

_REMEMBERED = 1024
_STEP = 0.8
_SMALLEST_SIDE = 16


class MeasuredVideoTokens:
    """For any other model: tokens are measured on blank frames.

    `count(frames, width, height)` runs the model's processor, which takes as long as for a real
    video; results are remembered. A cap is met by shrinking frames in steps, as long as each has
    more than `FLOOR` tokens and shrinking helps, and then by taking half of the frames.
    """

    family = "measured"
    least_frames = 1
    low = _LOW

    def __init__(self, count: Callable[[int, int, int], Count]) -> None:
        self._count = functools.lru_cache(_REMEMBERED)(count)

    def fewest(self, frames: int, width: int, height: int) -> int:
        sizes = [(width, height), *_smaller(width, height)]
        return min(self._count(1, *size).tokens for size in sizes)

    def allocate(
        self, frames: int, width: int, height: int, cap: int | None = None
    ) -> VideoAllocation:
        tokens = self._count(frames, width, height).tokens
        if cap is None or tokens <= cap:
            return VideoAllocation(tokens, frames, (width, height))
        while True:
            for size in _smaller(width, height):
                tokens = self._count(frames, *size).tokens
                if tokens <= cap:
                    return VideoAllocation(tokens, frames, size, size)
                if frames > 1 and tokens < FLOOR * frames:
                    break
            if frames == 1:
                raise _cap_too_low(self.fewest(1, width, height), cap)
            frames = max(frames // 2, 1)
            tokens = self._count(frames, width, height).tokens
            if tokens <= cap:
                return VideoAllocation(tokens, frames, (width, height))

    def prompt_tokens(self, allocation: VideoAllocation, times: Sequence[float]) -> int:
        return self._count(allocation.frames, *allocation.processed).prompt_tokens


def _smaller(width: int, height: int) -> list[Size]:
    sizes, side = [], int(max(width, height) * _STEP)
    while side >= _SMALLEST_SIDE:
        scale = side / max(width, height)
        sizes.append((max(round(width * scale), 1), max(round(height * scale), 1)))
        side = int(side * _STEP)
    return sizes


def _cap_too_low(fewest: int, cap: int) -> ImageTokenCap:
    return ImageTokenCap(
        f"the model needs at least {fewest} tokens for this video, and the cap is {cap}"
    )

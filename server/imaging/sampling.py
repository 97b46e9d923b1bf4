"""What a request asks of the frames of a video; pure arithmetic on their numbers and times."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class SamplingOptions(msgspec.Struct, frozen=True):
    """A request's options for one video. At most one of `fps`, `num_frames` and `max_frames` is
    set.

    Attributes:
        fps: frames per second, chosen by the model's own rule.
        num_frames: how many frames, evenly spaced from the first to the last.
        max_frames: most frames; the model's own rule chooses, and these are thinned out evenly.
        start_s, end_s: the part of the video to look at, in seconds from its first frame.
        max_tokens: a cap for the tokens of the video.
    """

    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    max_tokens: int | None = None


class ChosenFrames(NamedTuple):
    """The frames of a video that the processor gets.

    Attributes:
        indices: their numbers in the video, ascending; a frame may occur twice.
        metadata: what the processor is told of the video and these frames; "frames_indices" has a
            number for each of them, which is its time at "fps".
    """

    indices: tuple[int, ...]
    metadata: dict[str, Any]

    def limited(self, least: int, most: int) -> "ChosenFrames":
        """`most` of the frames, evenly spaced; or `least`, with the last one repeated."""
        if least <= len(self.indices) <= most:
            return self
        told = _resized(self.metadata["frames_indices"], len(self.indices), len(self.indices))
        indices, shown = (_resized(each, least, most) for each in (self.indices, told))
        return ChosenFrames(tuple(indices), {**self.metadata, "frames_indices": shown})


def _resized(items: Sequence[T], least: int, most: int) -> list[T]:
    kept = spread(items, most)
    return kept + kept[-1:] * (least - len(kept))


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of `items`, evenly spaced from the first to the last; all if there are fewer."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def span(
    times: npt.NDArray[np.float64], start_s: float | None, end_s: float | None
) -> tuple[int, int]:
    """The number of the first frame that is shown at `start_s` or later, and that of the first one
    shown at `end_s` or later; `times`, ascending, are in seconds."""
    first = 0 if start_s is None else int(np.searchsorted(times, start_s))
    last = len(times) if end_s is None else int(np.searchsorted(times, end_s))
    return first, last

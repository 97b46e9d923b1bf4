"""How many tokens each video of a request gets, and how many of its frames: the cap of the part,
the server's, and the request's budget, which videos share with images.

frames that the model's rule takes, size -> cap -> share of the budget -> allocation
"""

import asyncio
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.engine.token_allocator import Sized, TokenAllocator
from server.errors import ImageAspectRatio, ImageTokenCap, InvalidImage, InvalidVideo
from server.imaging.tokens import TokenAllocation
from server.imaging.tokens.budget import Asking, allocate_all
from server.imaging.tokens.video import MeasuredVideoTokens, VideoAllocation, VideoRule
from server.imaging.video.encoded import EncodedVideo

# Each set of processor options needs its own rule; few clients send any.
_RULES = 64

# Errors of an image or a video that no allocation fits.
_UNFIT = (ImageTokenCap, ImageAspectRatio, InvalidImage, InvalidVideo)

# Builds the model's rule for some processor options. Slow: it runs the processor.
MakeVideoRule = Callable[[Mapping[str, Any]], VideoRule]


class VideoAllocator:
    """Allocates tokens to the videos of a request, and to its images beside them.

    For a model of no known family, videos are measured: the processor runs once for each size and
    number of frames. That is done only if a cap applies.
    """

    def __init__(self, make_rule: MakeVideoRule, images: TokenAllocator, cap: int | None) -> None:
        """`cap`: the server's limit for the tokens of one video."""
        self._images = images
        self._cap = cap
        self._rule_of = functools.lru_cache(_RULES)(lambda text: make_rule(json.loads(text)))

    def rule(self, options: Mapping[str, Any]) -> VideoRule:
        """The model's rule for the processor options of a request. May block."""
        return self._rule_of(json.dumps(dict(options), sort_keys=True) if options else "{}")

    async def allocate(
        self,
        sized: Sized,
        videos: Sequence[EncodedVideo],
        paths: Sequence[str],
        budget: int | None,
        options: Mapping[str, Any],
    ) -> tuple[list[TokenAllocation], list[VideoAllocation | None]]:
        """An allocation for each image, given by its size, and for each video; None for videos that
        would be measured while no cap applies. `paths` are the places of all in the request.

        Raises:
            ImageTokenCap: one of them, or all together, need more tokens than allowed.
            ImageAspectRatio, InvalidImage, InvalidVideo: the model does not accept this shape.
        """
        return await asyncio.to_thread(self._allocate, sized, videos, paths, budget, options)

    async def costs(
        self,
        sized: Sized,
        videos: Sequence[EncodedVideo],
        paths: Sequence[str],
        budget: int | None,
    ) -> tuple[list[TokenAllocation], list[VideoAllocation]]:
        """The same, but all videos are measured where the family is not known."""
        work = functools.partial(self._allocate, measured=True)
        pictures, clips = await asyncio.to_thread(work, sized, videos, paths, budget, {})
        return pictures, [clip for clip in clips if clip is not None]

    def limited(self, videos: Sequence[EncodedVideo], budget: int | None) -> bool:
        """Whether a cap or budget applies to any of these videos."""
        caps = self._cap is not None or budget is not None
        return caps or any(video.options.max_tokens is not None for video in videos)

    def _allocate(
        self,
        sized: Sized,
        videos: Sequence[EncodedVideo],
        paths: Sequence[str],
        budget: int | None,
        options: Mapping[str, Any],
        *,
        measured: bool = False,
    ) -> tuple[list[TokenAllocation], list[VideoAllocation | None]]:
        asking: list[Asking | None] = [
            *self._images.asking(sized, options),
            *self._asking(videos, budget, options, measured=measured),
        ]
        counted = [each for each in asking if each is not None]
        try:
            found = iter(allocate_all(counted, budget))
        except _UNFIT as error:
            error.param = _culprit(asking, paths)
            raise
        given: list[Any] = [None if each is None else next(found) for each in asking]
        return given[: len(sized)], given[len(sized) :]

    def _asking(
        self,
        videos: Sequence[EncodedVideo],
        budget: int | None,
        options: Mapping[str, Any],
        *,
        measured: bool,
    ) -> list[Asking | None]:
        rule = self.rule(options)
        is_free = not measured and not self.limited(videos, budget)
        if isinstance(rule, MeasuredVideoTokens) and is_free:
            return [None] * len(videos)
        return [self._asks(rule, video) for video in videos]

    def _asks(self, rule: VideoRule, video: EncodedVideo) -> Asking:
        frames, (width, height) = len(video.chosen.indices), video.size
        caps = [cap for cap in (self._cap, video.options.max_tokens) if cap is not None]
        return Asking(
            area=frames * width * height,
            low=rule.low,
            fewest=functools.partial(rule.fewest, frames, width, height),
            allocate=functools.partial(rule.allocate, frames, width, height),
            cap=min(caps, default=None),
        )


def _culprit(asking: Sequence[Asking | None], paths: Sequence[str]) -> str:
    """The path of the first one that fails by itself; else they fail together."""
    for each, path in zip(asking, paths, strict=True):
        try:
            if each is not None:
                each.allocate(each.cap)
        except _UNFIT:
            return path
    return "max_image_tokens"

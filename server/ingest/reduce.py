"""Reduces pictures to what has detail, where the policy of their `detail` says so.

    image -> blocks with detail (a worker, or remembered) -> plan -> the image as its views

A view is an image like any other: the same file, with a crop and a cap in its options. So the
prompt is rendered, tokens are counted and features are cached as for pages of a PDF.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from cachetools import LRUCache

from server.concurrency import all_or_none
from server.errors import UnknownImage
from server.imaging.detail import looked_at
from server.imaging.encoded import Crop, EncodedImage, ImageOptions
from server.imaging.reduction import Box, Reduction, Shown, plan
from server.imaging.sizing import Size
from server.request.context import RequestContext
from server.request.groups import prefixed
from server.telemetry.record import Record
from server.workers.jobs import FindDetail

# Pictures whose blocks are remembered. Each has at most some 32.
_REMEMBERED = 4096

TokensOf = Callable[[Size, ImageOptions], int | None]
"""The tokens of a picture under its caps; None if the family has no such number."""


class Finder(Protocol):
    """Looks for detail. The image pool implements it, in its workers."""

    async def find_detail(
        self, key: str, data: bytes, job: FindDetail, record: Record
    ) -> list[tuple[int, int, int, int]]:
        """The blocks with detail, in pixels of `job.resize`."""
        ...


class Reducer:
    """Turns images into the views of them that the model sees."""

    def __init__(self, finder: Finder, auto: Reduction, tokens: TokensOf) -> None:
        """`auto` is the policy of images whose `detail` is "auto"."""
        self._finder = finder
        self._auto = auto
        self._tokens = tokens
        self._known: LRUCache[str, list[Box]] = LRUCache(_REMEMBERED)

    async def reduce(
        self, images: Sequence[EncodedImage], context: RequestContext, room: int, count: int = 1
    ) -> list[EncodedImage]:
        """The views of `images` in their order, at most `room` of each. The request has `count`
        images, which share its budget.

        Raises:
            UnknownImage: an image has no data, and its detail is not remembered.
            SaccadeError: those of `ImagePool.process`; ImageAspectRatio.
        """
        budget = context.max_image_tokens
        share = None if budget is None else budget // count
        views = await all_or_none([self._views(image, context, room, share) for image in images])
        return [view for each in views for view in each]

    def reduces(self, image: EncodedImage) -> bool:
        """Whether the policy of `image` is another than to show it whole."""
        return self._policy(image.options) != "whole"

    def _policy(self, options: ImageOptions) -> Reduction:
        if options.reduction is not None:
            return options.reduction
        return self._auto if options.detail == "auto" else "whole"

    async def _views(
        self, image: EncodedImage, context: RequestContext, room: int, share: int | None
    ) -> list[EncodedImage]:
        policy, options = self._policy(image.options), image.options
        if policy == "whole":
            return [image]
        blocks = await self._blocks(image, context)
        has_number = self._tokens(image.size, options) is not None
        count = (lambda size: self._tokens(size, options) or 1) if has_number else None
        planned = plan(policy, image.size, blocks, room, count, share)
        return [_view(image, shown, len(planned) > 1) for shown in planned]

    async def _blocks(self, image: EncodedImage, context: RequestContext) -> list[Box]:
        frame, size = image.options.frame, image.size
        name = f"detail-{image.digest}-{frame}-{size[0]}x{size[1]}"
        key = prefixed(name, context.group)
        found = self._known.get(key)
        if found is not None:
            return found
        if not image.data:
            raise UnknownImage("an image named by its uuid is no longer cached; send it again")
        resize = looked_at(size)
        job = FindDetail(image.header.format, size, frame, resize)
        blocks = await self._finder.find_detail(key, image.data, job, context.record)
        found = self._known[key] = [_scaled(block, resize, size) for block in blocks]
        return found


def _scaled(block: Box, resize: Size, size: Size) -> Box:
    """`block` in pixels of the picture, rounded outwards."""
    across, down = size[0] / resize[0], size[1] / resize[1]
    left, top, right, bottom = block
    return (
        math.floor(left * across),
        math.floor(top * down),
        min(size[0], math.ceil(right * across)),
        min(size[1], math.ceil(bottom * down)),
    )


def _view(image: EncodedImage, shown: Shown, is_one_of_several: bool) -> EncodedImage:
    """One of several views keeps its tokens where images share a budget: views are planned within
    the picture's part of it, and a crop has too little area for a fair one."""
    caps = [cap for cap in (image.options.max_tokens, shown.max_tokens) if cap is not None]
    crop = Crop(shown.box, image.size) if shown.box is not None else None
    cap = min(caps, default=None)
    least = cap if is_one_of_several else None
    options = replace(image.options, max_tokens=cap, crop=crop, least=least)
    return replace(image, options=options)

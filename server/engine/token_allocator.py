"""How many tokens each image of a request gets: the server's cap, the request's, the model's rule.

size from the header + options -> cap of the image -> share of the request's budget -> allocation
"""

import asyncio
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from server.errors import ClientError, ImageAspectRatio, ImageTokenCap, InvalidImage
from server.imaging.encoded import EncodedImage, ImageOptions
from server.imaging.sizing import Size
from server.imaging.tokens import (
    MeasuredTokens,
    TokenAllocation,
    TokenRule,
    View,
    detail_cap,
    kv_bytes_per_token,
)
from server.imaging.tokens.budget import Asking, allocate_all, asking
from server.request.context import ShownImage

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

# Each set of processor options needs its own rule; few clients send any.
_RULES = 64

# Sharing a budget computes many allocations for each image. With more images than this, it runs
# in a thread.
_FEW_IMAGES = 4

# Errors of an image that no allocation fits.
_UNFIT = (ImageTokenCap, ImageAspectRatio, InvalidImage)

Cap = Literal["none", "server", "request", "image"]
# Builds the model's rule for some processor options. Slow: it runs the processor.
MakeRule = Callable[[Mapping[str, Any]], TokenRule]
Sized = Sequence[tuple[Size, ImageOptions]]


@dataclass(frozen=True)
class Crowd:
    """A model that treats pictures in another way if a prompt has more than `more_than`:
    `make_rule` is for these."""

    more_than: int
    make_rule: MakeRule


class TokenAllocator:
    """Allocates tokens to the images of a request, under their caps and the request's budget.

    For a model of no known family, images are measured: the processor runs once for each size. That
    is done only if a cap applies.
    """

    def __init__(self, make_rule: MakeRule, cap: int | None, crowd: Crowd | None = None) -> None:
        """`cap`: the server's limit for the tokens of one image."""
        self._cap = cap
        self._most_apart = crowd.more_than if crowd else math.inf

        def made(text: str, crowded: bool) -> TokenRule:
            make = crowd.make_rule if crowd and crowded else make_rule
            return make(json.loads(text))

        self._rule_of = functools.lru_cache(_RULES)(made)

    def rule(self, options: Mapping[str, Any], images: int = 1) -> TokenRule:
        """The model's rule for the processor options of a request with so many images. May
        block."""
        text = json.dumps(dict(options), sort_keys=True) if options else "{}"
        return self._rule_of(text, images > self._most_apart)

    async def _rule(self, options: Mapping[str, Any], images: int) -> TokenRule:
        if not options:
            return self.rule(options, images)
        return await asyncio.to_thread(self.rule, options, images)

    async def allocate(
        self, images: Sequence[EncodedImage], budget: int | None, options: Mapping[str, Any]
    ) -> list[TokenAllocation | None]:
        """An allocation for each image; None if images would be measured and no cap applies.

        Raises:
            ImageTokenCap: one image, or all together, need more tokens than allowed.
            ImageAspectRatio, InvalidImage: the model does not accept images of this shape.
        """
        rule = await self._rule(options, len(images))
        sized = [(image.size, image.options) for image in images]
        if isinstance(rule, MeasuredTokens) and not self.limited(images, budget):
            return [None] * len(images)
        paths = [image.path for image in images]
        return list(await self._allocated(rule, sized, paths, budget))

    def asking(self, sized: Sized, options: Mapping[str, Any]) -> list[Asking]:
        """What each image asks of a budget that it shares with videos. May block."""
        rule = self.rule(options, len(sized))
        return [asking(rule, size, self._cap_of(rule, size, asked)) for size, asked in sized]

    def limited(self, images: Sequence[EncodedImage], budget: int | None) -> bool:
        """Whether a cap or budget applies to any of these images."""
        caps = self._cap is not None or budget is not None
        return caps or any(_limited(image.options) for image in images)

    def effective_cap(
        self,
        image: EncodedImage,
        allocation: TokenAllocation,
        budget: int | None,
        options: Mapping[str, Any],
    ) -> Cap:
        """Which cap reduced the image's tokens; "none" if it has as many as without a cap."""
        if not self.limited([image], budget):
            return "none"
        rule = self.rule(options)
        requested = _requested_cap(rule, image.size, image.options)
        if isinstance(rule, MeasuredTokens):  # measuring again would take too long
            if allocation.resize is None:
                return "none"
            is_shared_out = requested is None and self._cap is None
        else:
            if allocation.tokens >= rule.allocate(*image.size).tokens:
                return "none"
            cap = self._cap_of(rule, image.size, image.options)
            is_shared_out = allocation.tokens < rule.allocate(*image.size, cap).tokens
        if is_shared_out:
            return "request"
        return "server" if requested is None or requested > (self._cap or requested) else "image"

    def tokens(self, size: Size, options: ImageOptions) -> int | None:
        """The tokens of a picture whose tokens grow with its area, under the caps of its options
        and of the server; None for families that have tiles, or must be measured.

        Raises:
            ImageAspectRatio: the model does not accept images of this shape.
        """
        rule = self.rule({})
        if rule.least > 1 or isinstance(rule, MeasuredTokens):
            return None
        return rule.allocate(*size, self._cap_of(rule, size, options)).tokens

    async def costs(
        self, sized: Sized, paths: Sequence[str], budget: int | None
    ) -> list[TokenAllocation]:
        """An allocation for each picture, given by its size. `paths` are their places in the
        request. Raises as `allocate` does."""
        return await self._allocated(self.rule({}, len(sized)), sized, paths, budget)

    def views(self, size: Size, allocation: TokenAllocation) -> list[View]:
        """What the encoder sees of a picture with this allocation."""
        return self.rule({}).views(*size, allocation)

    async def _allocated(
        self, rule: TokenRule, sized: Sized, paths: Sequence[str], budget: int | None
    ) -> list[TokenAllocation]:
        measured = isinstance(rule, MeasuredTokens)
        try:
            if measured or (budget and len(sized) > _FEW_IMAGES):
                return await asyncio.to_thread(self._allocate, rule, sized, budget)
            return self._allocate(rule, sized, budget)
        except _UNFIT as error:
            find = self._culprit
            found = await asyncio.to_thread(find, rule, sized) if measured else find(rule, sized)
            error.param = "max_image_tokens" if found is None else paths[found]
            raise

    def _allocate(self, rule: TokenRule, sized: Sized, budget: int | None) -> list[TokenAllocation]:
        return allocate_all([self._asking(rule, size, asked) for size, asked in sized], budget)

    def _asking(self, rule: TokenRule, size: Size, options: ImageOptions) -> Asking:
        cap = self._cap_of(rule, size, options)
        each = asking(rule, size, cap)
        if options.least is None:
            return each
        least = min(options.least, cap or options.least)
        fewest = each.fewest
        return Asking(each.area, each.low, lambda: max(least, fewest()), each.allocate, each.cap)

    def _cap_of(self, rule: TokenRule, size: Size, options: ImageOptions) -> int | None:
        return _least(self._cap, _requested_cap(rule, size, options))

    def _culprit(self, rule: TokenRule, sized: Sized) -> int | None:
        """The index of the first image whose allocation fails by itself."""
        for index, each in enumerate(sized):
            try:
                self._allocate(rule, [each], None)
            except _UNFIT:
                return index
        return None


def _requested_cap(rule: TokenRule, size: Size, options: ImageOptions) -> int | None:
    """The cap that the request sets for one image."""
    return _least(options.max_tokens, detail_cap(rule, options.detail, *size))


def _least(*caps: int | None) -> int | None:
    return min((cap for cap in caps if cap is not None), default=None)


def _limited(options: ImageOptions) -> bool:
    return options.detail != "auto" or options.max_tokens is not None


def shown_image(
    size: Size,
    options: ImageOptions,
    tokens: int,
    allocation: TokenAllocation | None,
    cached: bool = False,
) -> ShownImage:
    """What is shown of an image of `size`, which may be a part of a larger picture."""
    return ShownImage(
        size=options.original(size),
        tokens=tokens,
        processed=allocation.processed if allocation else None,
        region=options.in_original(allocation.region) if allocation else None,
        frame=options.frame,
        cached=cached,
    )


# ---------------------------------------------------------------------- costs


@dataclass(frozen=True)
class ImageCost:
    """How a picture would be shown, the length of its placeholder in the prompt, the bytes of KV
    cache that it would take, and what the encoder would see, if that was asked for."""

    shown: ShownImage
    prompt_tokens: int
    kv_bytes: int
    views: list[View]


async def image_costs(
    engine: "AsyncLLM",
    sized: Sized,
    paths: Sequence[str],
    budget: int | None,
    *,
    with_views: bool = False,
) -> list[ImageCost]:
    """The cost of each picture, given by its size. The model does not run. `paths` are the places
    of the pictures in the request.

    Raises:
        ImageTokenCap, ImageAspectRatio, InvalidImage: a request with these images would fail in
            the same way.
        ClientError: this model's images are processed by vLLM, so their tokens are not known.
    """
    renderer: Any = engine.renderer  # vLLM types it as its base class
    allocator: TokenAllocator | None = getattr(renderer, "allocator", None)
    if allocator is None:
        raise ClientError("the image tokens of this model cannot be computed in advance")
    allocations = await allocator.costs(sized, paths, budget)
    return costs_of(engine, allocator, sized, allocations, with_views=with_views)


def costs_of(
    engine: "AsyncLLM",
    allocator: TokenAllocator,
    sized: Sized,
    allocations: Sequence[TokenAllocation],
    *,
    with_views: bool,
) -> list[ImageCost]:
    """The cost of each picture with its allocation."""
    bytes_per_token = kv_bytes_of_token(engine.vllm_config)
    return [
        ImageCost(
            shown_image(size, options, allocation.tokens, allocation),
            allocation.prompt_tokens,
            allocation.prompt_tokens * bytes_per_token,
            _views(allocator, size, options, allocation) if with_views else [],
        )
        for (size, options), allocation in zip(sized, allocations, strict=True)
    ]


def _views(
    allocator: TokenAllocator, size: Size, options: ImageOptions, allocation: TokenAllocation
) -> list[View]:
    """What the encoder sees, by regions of the original picture."""
    views = allocator.views(size, allocation)
    return [replace(view, region=options.in_original(view.region) or view.region) for view in views]


def patch_size(engine: "AsyncLLM") -> int | None:
    """The side of a patch of the vision encoder, in pixels; None if the configuration has none."""
    return patch_side(getattr(engine.model_config.hf_config, "vision_config", None))


def patch_side(vision_config: Any) -> int | None:
    """The same, of the configuration of a vision encoder."""
    found = getattr(vision_config, "patch_size", None)
    if isinstance(found, list | tuple):  # (height, width), which are equal
        found = found[0]
    return found if isinstance(found, int) else None


def kv_bytes_of_token(config: "VllmConfig") -> int:
    """Bytes of KV cache for one token, over all layers and ranks. An upper bound for models that
    compress keys and values or keep only a window of them."""
    model, cache_dtype = config.model_config, config.cache_config.cache_dtype
    if cache_dtype == "auto":
        dtype: Any = model.dtype
        dtype_bytes = int(dtype.itemsize)
    else:
        dtype_bytes = 1 if "8" in cache_dtype else 2
    layers = int(model.hf_text_config.num_hidden_layers)
    heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
    return kv_bytes_per_token(layers, heads, head_dim, dtype_bytes)

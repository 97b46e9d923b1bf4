"""How many tokens each image of a request gets: the server's cap, the request's, the model's rule.

size from the header + options -> cap of the image -> share of the request's budget -> plan
"""

import asyncio
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from server.errors import ClientError, ImageAspectRatio, ImageTokenCap
from server.imaging.encoded import EncodedImage, ImageOptions
from server.imaging.sizing import Size
from server.imaging.tokens import (
    ImagePlan,
    MeasuredTokens,
    TokenRule,
    detail_cap,
    kv_bytes_per_token,
    plan_together,
)
from server.request.context import ShownImage

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

# Options of a request's own make a rule of their own; few clients send any.
_RULES = 64

# Sharing out a budget tries many plans for each image.
_FEW_IMAGES = 4

Cap = Literal["none", "server", "request", "image"]
# Makes the model's rule under some processor options. Slow: it runs the processor.
MakeRule = Callable[[Mapping[str, Any]], TokenRule]
Sized = Sequence[tuple[Size, ImageOptions]]


class ImagePlanner:
    """Plans the images of a request under caps and budget.

    A model of no known family has its images measured, which takes a run of the processor for
    each size; that is done only where a cap asks for it.
    """

    def __init__(self, make_rule: MakeRule, cap: int | None) -> None:
        """`cap`: the most tokens of any image, by the server's settings."""
        self._cap = cap
        self._rule_of = functools.lru_cache(_RULES)(lambda text: make_rule(json.loads(text)))

    def rule(self, options: Mapping[str, Any]) -> TokenRule:
        """The model's rule under the processor options of a request. May block."""
        return self._rule_of(json.dumps(dict(options), sort_keys=True))

    async def _rule(self, options: Mapping[str, Any]) -> TokenRule:
        return self.rule(options) if not options else await asyncio.to_thread(self.rule, options)

    async def plan(
        self, images: Sequence[EncodedImage], budget: int | None, options: Mapping[str, Any]
    ) -> list[ImagePlan | None]:
        """A plan for each image; None where nothing limits an image that would be measured.

        Raises:
            ImageTokenCap: an image, or all together, cannot be shown in so few tokens.
            ImageAspectRatio: the model's processor takes no image of this shape.
        """
        rule = await self._rule(options)
        sized = [(image.size, image.options) for image in images]
        if isinstance(rule, MeasuredTokens) and not self.limited(images, budget):
            return [None] * len(images)
        try:
            return list(await self._planned(rule, sized, budget))
        except (ImageTokenCap, ImageAspectRatio) as error:
            error.param = self._culprit(rule, images) or "max_image_tokens"
            raise

    def limited(self, images: Sequence[EncodedImage], budget: int | None) -> bool:
        """Whether any cap has been promised for these images."""
        caps = self._cap is not None or budget is not None
        return caps or any(_limited(image.options) for image in images)

    def cap_at_work(
        self, image: EncodedImage, plan: ImagePlan, budget: int | None, options: Mapping[str, Any]
    ) -> Cap:
        """Which cap made `plan` smaller than the image would be without any; "none" if none did."""
        if not self.limited([image], budget):
            return "none"
        rule = self.rule(options)
        own = _own_cap(rule, image.size, image.options)
        if isinstance(rule, MeasuredTokens):  # to measure again would take too long
            if plan.resize is None:
                return "none"
            is_shared_out = own is None and self._cap is None
        else:
            if plan.tokens >= rule.plan(*image.size).tokens:
                return "none"
            cap = self._cap_of(rule, image.size, image.options)
            is_shared_out = plan.tokens < rule.plan(*image.size, cap).tokens
        if is_shared_out:
            return "request"
        return "server" if own is None or own > (self._cap or own) else "image"

    async def costs(self, sized: Sized, budget: int | None) -> list[ImagePlan]:
        """A plan for each picture of a known size. Raises as `plan` does."""
        return await self._planned(self.rule({}), sized, budget)

    async def _planned(self, rule: TokenRule, sized: Sized, budget: int | None) -> list[ImagePlan]:
        if isinstance(rule, MeasuredTokens) or (budget and len(sized) > _FEW_IMAGES):
            return await asyncio.to_thread(self._plans, rule, sized, budget)
        return self._plans(rule, sized, budget)

    def _plans(self, rule: TokenRule, sized: Sized, budget: int | None) -> list[ImagePlan]:
        caps = [self._cap_of(rule, size, options) for size, options in sized]
        return plan_together(rule, [size for size, _ in sized], budget, caps)

    def _cap_of(self, rule: TokenRule, size: Size, options: ImageOptions) -> int | None:
        return _least(self._cap, _own_cap(rule, size, options))

    def _culprit(self, rule: TokenRule, images: Sequence[EncodedImage]) -> str | None:
        """The path of the first image that cannot be planned by itself."""
        for image in images:
            try:
                self._plans(rule, [(image.size, image.options)], None)
            except (ImageTokenCap, ImageAspectRatio):
                return image.path
        return None


def _own_cap(rule: TokenRule, size: Size, options: ImageOptions) -> int | None:
    """What a request says of one image."""
    return _least(options.max_tokens, detail_cap(rule, options.detail, *size))


def _least(*caps: int | None) -> int | None:
    return min((cap for cap in caps if cap is not None), default=None)


def _limited(options: ImageOptions) -> bool:
    return options.detail != "auto" or options.max_tokens is not None


# ---------------------------------------------------------------------- costs


async def image_costs(
    engine: "AsyncLLM", sized: Sized, budget: int | None
) -> list[tuple[ShownImage, int]]:
    """For each picture of a known size how it would be shown, and its KV cache in bytes. The model
    does not run.

    Raises:
        ImageTokenCap, ImageAspectRatio: as a request with these images would.
        ClientError: vLLM alone knows what images cost this model.
    """
    renderer: Any = engine.renderer  # vLLM types it as its base class
    planner: ImagePlanner | None = getattr(renderer, "planner", None)
    if planner is None:
        raise ClientError("the tokens of images cannot be counted ahead for this model")
    plans = await planner.costs(sized, budget)
    bytes_per_token = _kv_bytes_per_token(engine.vllm_config)
    return [
        (
            ShownImage(size, plan.tokens, plan.processed, plan.region, options.frame),
            plan.prompt_tokens * bytes_per_token,
        )
        for (size, options), plan in zip(sized, plans, strict=True)
    ]


def _kv_bytes_per_token(config: "VllmConfig") -> int:
    """Over all layers and all ranks. A model that compresses keys and values, or keeps only a
    window of them, takes less."""
    model, cache_dtype = config.model_config, config.cache_config.cache_dtype
    if cache_dtype == "auto":
        dtype: Any = model.dtype
        dtype_bytes = int(dtype.itemsize)
    else:
        dtype_bytes = 1 if "8" in cache_dtype else 2
    layers = int(model.hf_text_config.num_hidden_layers)
    heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
    return kv_bytes_per_token(layers, heads, head_dim, dtype_bytes)

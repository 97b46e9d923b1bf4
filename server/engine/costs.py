"""What images would cost, without running the model."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.planning import Sized
from server.engine.renderer import PooledRenderer
from server.imaging.tokens import kv_bytes_per_token
from server.request.context import ShownImage


async def image_costs(
    engine: AsyncLLM, sized: Sized, budget: int | None
) -> list[tuple[ShownImage, int]]:
    """For each picture of a known size how it would be shown, and its KV cache in bytes.

    Raises:
        ImageTokenCap, ImageAspectRatio: as a request with these images would.
    """
    renderer: Any = engine.renderer
    assert isinstance(renderer, PooledRenderer)
    plans = await renderer.planner.costs(sized, budget)
    bytes_per_token = _kv_bytes_per_token(engine.vllm_config)
    return [
        (
            ShownImage(size, plan.tokens, plan.processed, plan.region, options.frame),
            plan.prompt_tokens * bytes_per_token,
        )
        for (size, options), plan in zip(sized, plans, strict=True)
    ]


def _kv_bytes_per_token(config: VllmConfig) -> int:
    """Over all layers and all ranks. A model that compresses keys and values, or keeps only a
    window of them, takes less."""
    model, cache_dtype = config.model_config, config.cache_config.cache_dtype
    if cache_dtype == "auto":
        assert isinstance(model.dtype, torch.dtype)
        dtype_bytes = model.dtype.itemsize
    else:
        dtype_bytes = 1 if "8" in cache_dtype else 2
    layers = int(model.hf_text_config.num_hidden_layers)
    heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
    return kv_bytes_per_token(layers, heads, head_dim, dtype_bytes)

"""All caches of the engine: sizes, emptying, and the limit for items of the encoder cache."""

import asyncio
from typing import Any

from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.embedding_cache.control import ControlServer
from server.engine.vllm_adapter.processor_cache import ProcessorCache
from server.engine.vllm_adapter.send import Gate

# The values of each tier in reports; histograms are only in the metrics.
_SIZES = ("entries", "bytes", "tokens", "max_bytes", "max_tokens")
_COUNTS = ("hits", "misses", "evictions", "errors", "dropped")


class EngineCaches:
    """`features` is vLLM's processor cache, and `embeddings` the control server of the embedding
    caches; each is None if it does not exist. Requests pass `gate` before they are sent."""

    def __init__(
        self,
        engine: AsyncLLM,
        features: ProcessorCache | None,
        embeddings: ControlServer | None,
        gate: Gate,
        *,
        is_only: bool = True,
    ) -> None:
        """`is_only`: no other front end sends requests to the engine."""
        self._engine = engine
        self._features = features
        self._embeddings = embeddings
        self._gate = gate
        self._is_only = is_only

    async def report(self) -> dict[str, Any]:
        """Sizes and counts, by cache and tier."""
        found: dict[str, Any] = {}
        if self._features is not None:
            size, stats = self._features.size(), self._features.make_stats()
            found["features"] = {
                "entries": size.entries,
                "bytes": size.bytes,
                "max_bytes": size.max_bytes,
                "hits": stats.hits,
                "misses": stats.total - stats.hits,
            }
        if self._embeddings is not None:
            found["embeddings"] = _summed(await self._embeddings.report())
        return found

    async def clear(self) -> list[str]:
        """Empty the caches, and return which of them could be. Requests that run go on: what they
        may be using stays while there are any."""
        cleared = []
        async with self._gate.closed():
            outputs: Any = self._engine.output_processor
            idle = not outputs.get_num_unfinished_requests()
            if self._features is not None and (idle or not self._features_are_in_use()):
                await self._engine.reset_mm_cache()
                renderer: Any = self._engine.renderer
                await asyncio.to_thread(renderer.forget_features)
                cleared.append("features")
            if await self._engine.reset_prefix_cache():
                cleared.append("prefixes")
            all_idle = idle and self._is_only
            if all_idle and (self._embeddings is None or await self._embeddings.expect_reset()):
                await self._engine.engine_core.reset_encoder_cache_async()
                cleared.append("embeddings.gpu")
            if self._embeddings is not None:
                await self._embeddings.clear()
                tiers = _summed(list(self._embeddings.snapshots.values()))
                cleared += [f"embeddings.{tier}" for tier in tiers if tier != "gpu"]
        return cleared

    def _features_are_in_use(self) -> bool:
        """Whether requests that wait in the engine find their features in the cache only then."""
        model = self._engine.model_config
        options = model.multimodal_config
        shared = options is not None and options.mm_processor_cache_type == "shm"
        return shared or model.runner_type == "pooling"


def _summed(snapshots: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tier -> counts and sizes of all engines together. What lies below the host's memory is
    shared by them: its size is that of one."""
    tiers: dict[str, dict[str, Any]] = {}
    for snapshot in snapshots:
        for tier, found in snapshot.items():
            into = tiers.setdefault(tier, dict.fromkeys(_COUNTS, 0))
            for name in _COUNTS:
                into[name] += found[name]
            for name in _SIZES:
                if found.get(name) is not None:
                    before = into.get(name, 0) if tier in ("gpu", "host") else 0
                    into[name] = before + found[name]
    for found in tiers.values():
        asked = found["hits"] + found["misses"]
        found["hit_rate"] = found["hits"] / asked if asked else None
    return tiers


def keep_item_limit(engine: AsyncLLM) -> None:
    """Refuse items that are too large for one step, even if the encoder cache could hold them.

    vLLM checks items against the size of the cache, which it assumes to be the limit of a step;
    larger items would wait forever.
    """
    scheduler = engine.vllm_config.scheduler_config
    if scheduler.encoder_cache_size > scheduler.max_num_encoder_input_tokens:
        checked: Any = engine.input_processor
        budget = MultiModalBudget(engine.vllm_config, MULTIMODAL_REGISTRY)
        checked.mm_encoder_cache_size = budget.get_encoder_budget()

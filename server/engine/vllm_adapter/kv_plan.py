"""vLLM's own arithmetic of KV caches, for an engine that does not run."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_max_concurrency_for_kv_cache_config,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MLAAttentionSpec

# Any layout: sizes do not depend on it.
_LAYOUT = "LBNHC"


class KvPlan:
    """The KV cache of a model's layers on one GPU: a `planner.shape.KvRule`."""

    def __init__(self, config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> None:
        """`specs`: what each layer keeps, by its name."""
        self._config = config
        self._specs = dict(specs)

    @property
    def bytes_per_token(self) -> int:
        """Of a short request: all layers grow."""
        return sum(
            spec.page_size_bytes // spec.block_size
            for spec in self._specs.values()
            if isinstance(spec, AttentionSpec)
        )

    def request_bytes(self, tokens: int) -> int:
        config = self._for_length(tokens)
        return sum(spec.max_memory_usage_bytes(config) for spec in self._specs.values())

    def concurrency(self, available: int, tokens: int) -> float:
        """As vLLM's line "Maximum concurrency for ... tokens per request"."""
        config = self._for_length(tokens)
        if not self._specs:
            return float("inf")
        try:
            (cache,) = get_kv_cache_configs(config, [copy.deepcopy(self._specs)], [available])
        except ValueError:  # not even one fits
            return available / self.request_bytes(tokens)
        return float(get_max_concurrency_for_kv_cache_config(config, cache))

    def split(self, gpus: int) -> "KvPlan":
        """Each GPU has a part of the heads, at least one."""
        if gpus == 1:
            return self
        return KvPlan(
            self._config, {name: _split(spec, gpus) for name, spec in self._specs.items()}
        )

    def in_fp8(self) -> "KvPlan | None":
        """None with compressed keys and values, or a state: their layout differs."""
        if any(not _has_heads(spec) for spec in self._specs.values()):
            return None
        halved = {
            name: replace(spec, dtype=torch.uint8)  # type: ignore[call-arg]
            for name, spec in self._specs.items()
        }
        return KvPlan(self._config, halved)

    def _for_length(self, tokens: int) -> VllmConfig:
        """The configuration of an engine whose longest request has `tokens` tokens."""
        config = copy.copy(self._config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.max_model_len = tokens
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.kv_cache_layout = _LAYOUT
        return config


def _has_heads(spec: KVCacheSpec) -> bool:
    return isinstance(spec, AttentionSpec) and not isinstance(spec, MLAAttentionSpec)


def _split(spec: KVCacheSpec, gpus: int) -> KVCacheSpec:
    if not _has_heads(spec):
        return spec  # compressed keys and values are whole on each GPU
    assert isinstance(spec, AttentionSpec)
    return replace(spec, num_kv_heads=max(spec.num_kv_heads // gpus, 1))

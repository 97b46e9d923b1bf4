"""A model of vLLM's without memory for its weights, to read their shapes and its KV cache from."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.kv_cache_interface import KVCacheSpec


def build(config: VllmConfig) -> tuple[nn.Module, dict[str, KVCacheSpec]]:
    """The model of `config`, with its weights on the device "meta", and what each of its layers
    keeps in the KV cache. Needs a tensor-parallel size of 1."""
    dtype: Any = config.model_config.dtype  # resolved, though its type allows names
    with _alone(config), torch.device("meta"):
        with set_default_torch_dtype(dtype):
            model = initialize_model(config)
        layers = get_layers_from_vllm_config(config, AttentionLayerBase)  # type: ignore[type-abstract]
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    return model, {name: spec for name, spec in specs.items() if spec is not None}


@contextmanager
def _alone(config: VllmConfig) -> Iterator[None]:
    """A distributed environment of this process alone; models ask for one."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{Path(folder) / 'alone'}", 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            cleanup_dist_env_and_memory()

"""Adds the embedding cache to vLLM's configuration before the engine starts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.config import ECTransferConfig, EncoderCacheManagerConfig, VllmConfig
from vllm.config.ec_transfer import ECRole
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from server.concurrency import usable_memory
from server.engine.embedding_cache.arena import LastingMemory
from server.engine.embedding_cache.connector import (
    AnnouncedEncoderCache,
    CacheOptions,
    EmbeddingCacheConnector,
)
from server.errors import CannotStart
from server.settings import GIB, MIB, CacheSettings

log = logging.getLogger("saccade.embeddings")

# The host tier's default size: a share of the machine's memory, and its limit.
_HOST_SHARE = 1 / 8
_MOST_HOST_BYTES = 32 * GIB
# Without a host tier, the buffer through which the other tiers read and write.
_STAGING_BYTES = 256 * MIB
# The GPU tier's default size: a share of the device's memory, and its limit.
_GPU_SHARE = 0.02
_MOST_GPU_TOKENS = 65_536

# The fields of Granite Vision's configuration with its levels.
_LEVELS = ("deepstack_layer_map", "spatial_target_layers")


def is_wanted(config: VllmConfig, settings: CacheSettings) -> bool:
    """Whether to add an embedding cache: a tier is enabled, model and engine support it, and the
    user has not configured another transfer of embeddings.

    Raises:
        CannotStart: the server is to encode only, and there can be no embedding cache.
    """
    on = (
        settings.embedding_cache_gb != 0
        or settings.embedding_cache_dir is not None
        or settings.embedding_cache_url is not None
    )
    model = config.model_config
    if settings.encode_only and (why := _obstacle(config)) is not None:
        raise CannotStart(f"--encode-only is not possible: {why}")
    if not on or not model.supports_multimodal_inputs or model.is_encoder_decoder:
        return False
    if (why := _obstacle(config)) is not None:
        log.warning("the embedding cache is off: %s", why)
        return False
    return settings.encode_only or config.ec_transfer_config is None


def encode_only(arguments: AsyncEngineArgs, settings: CacheSettings) -> None:
    """Let the engine that is made by `arguments` have no language model, if `settings` say so.

    Raises:
        CannotStart: there is nothing that other servers could read, or another transfer.
    """
    if not settings.encode_only:
        return
    if settings.embedding_cache_url is None and settings.embedding_cache_dir is None:
        raise CannotStart("--encode-only requires --embedding-cache-url or --embedding-cache-dir")
    if arguments.ec_transfer_config is not None:
        raise CannotStart("--encode-only and --ec-transfer-config exclude each other")
    arguments.ec_transfer_config = _transfer("ec_producer", {})


def _obstacle(config: VllmConfig) -> str | None:
    """Why this engine cannot have an embedding cache; None if it can."""
    model, parallel = config.model_config, config.parallel_config
    options = model.multimodal_config
    if parallel.nnodes > 1 or parallel.distributed_executor_backend in ("ray", "external_launcher"):
        return "the workers run on several machines, or have separate schedulers"
    pipeline = parallel.pipeline_parallel_size > 1
    if not config.use_v2_model_runner and (model.runner_type == "pooling" or pipeline):
        return "vLLM's V1 model runner drops the connector's reports for this kind of model"
    if options is not None and options.skip_mm_profiling:
        return "with --skip-mm-profiling, the encoder must not run at start-up"
    limits = [options.get_limit_per_prompt(each) for each in ("image", "video")] if options else []
    if not any(limits):
        return "the model accepts neither images nor videos"
    return None


def lasting_memory(config: VllmConfig, settings: CacheSettings) -> LastingMemory:
    """Memory for the host tier of the only engine that outlives it."""
    return LastingMemory(_arena_bytes(config, settings))


def configure(
    config: VllmConfig,
    settings: CacheSettings,
    controls: Sequence[str],
    memory: LastingMemory | None = None,
) -> None:
    """Configure vLLM to create the connector in each engine. `controls` are the addresses of the
    control servers, one in each front end. `memory`: where the host tier is, if not in the engine.

    Call it after vLLM has checked its configuration: during that check, a transfer that receives
    embeddings would also allow clients to send them.
    """
    url = settings.embedding_cache_url
    options = CacheOptions(
        host_bytes=_arena_bytes(config, settings),
        disk_directory=_text(settings.embedding_cache_dir),
        disk_bytes=int(settings.embedding_cache_disk_gb * GIB),
        shared_url=url.get_secret_value() if url is not None else None,
        patience_s=settings.embedding_cache_wait_s,
        controls=tuple(controls),
        host_memory=memory.path if memory is not None else None,
    )
    if config.ec_manager_config.encoder_cache_manager_cls is None:
        announced = AnnouncedEncoderCache
        name = f"{announced.__module__}.{announced.__qualname__}"
        config.ec_manager_config = EncoderCacheManagerConfig(encoder_cache_manager_cls=name)
    role: ECRole = "ec_producer" if settings.encode_only else "ec_both"
    config.ec_transfer_config = _transfer(role, options.extra_config())


def _transfer(role: ECRole, options: dict[str, Any]) -> ECTransferConfig:
    return ECTransferConfig(
        ec_connector=EmbeddingCacheConnector.__name__,
        ec_role=role,
        ec_connector_module_path=EmbeddingCacheConnector.__module__,
        ec_connector_extra_config=options,
    )


def size_gpu_tier(config: VllmConfig, settings: CacheSettings) -> None:
    """Let vLLM's encoder cache hold `encoder_cache_tokens`.

    vLLM measures its peak memory with the tokens of one step in that cache. The memory for further
    tokens is subtracted from the share of the device that vLLM may use.
    """
    scheduler, cache = config.scheduler_config, config.cache_config
    default = scheduler.encoder_cache_size
    tokens = settings.encoder_cache_tokens
    fixed = cache.kv_cache_memory_bytes
    if tokens is None and fixed is not None:
        return  # with a KV cache sized in bytes, the user has divided the memory
    token_bytes = _embedding_bytes(config)
    if current_platform.is_cpu():
        scheduler.encoder_cache_size = max(default, tokens or 0)
        return
    device_bytes = current_platform.get_device_total_memory()
    if tokens is None:
        tokens = min(_MOST_GPU_TOKENS, int(device_bytes * _GPU_SHARE) // token_bytes)
    more = max(0, tokens - default)
    scheduler.encoder_cache_size = default + more
    if fixed is not None:
        cache.kv_cache_memory_bytes = max(0, fixed - more * token_bytes)
    else:
        cache.gpu_memory_utilization -= more * token_bytes / device_bytes


def _embedding_bytes(config: VllmConfig) -> int:
    """Bytes of one token in the encoder cache. Encoders with features for several layers of the
    language model (DeepStack) concatenate them."""
    model = config.model_config
    whole: Any = model.hf_config
    parts = (whole, getattr(whole, "thinker_config", None))
    visions = [getattr(part, "vision_config", None) for part in parts]
    levels = [getattr(vision, "deepstack_visual_indexes", None) for vision in visions]
    levels += [getattr(whole, name, None) for name in _LEVELS]
    layers = 1 + sum(len(found or ()) for found in levels)
    item: int = getattr(model.dtype, "itemsize", 4)
    return layers * int(model.get_inputs_embeds_size()) * item


def _arena_bytes(config: VllmConfig, settings: CacheSettings) -> int:
    engines = config.parallel_config.data_parallel_size_local or 1
    return _host_bytes(settings) // engines or _STAGING_BYTES


def _host_bytes(settings: CacheSettings) -> int:
    if settings.embedding_cache_gb is not None:
        return int(settings.embedding_cache_gb * GIB)
    return min(_MOST_HOST_BYTES, int(usable_memory() * _HOST_SHARE))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())

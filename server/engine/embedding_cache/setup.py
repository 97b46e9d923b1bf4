"""Puts the embedding cache into vLLM's configuration before the engine starts."""

import logging
import os
from pathlib import Path
from typing import Any

from vllm.config import ECTransferConfig, EncoderCacheManagerConfig, VllmConfig
from vllm.platforms import current_platform

from server.config import GIB, MIB, CacheSettings
from server.engine.embedding_cache.connector import CacheOptions, EmbeddingCacheConnector
from server.engine.embedding_cache.manager import AnnouncedEncoderCache

log = logging.getLogger("saccade.embeddings")

# The host tier's default: a share of the machine's memory, and no more than this.
_HOST_SHARE = 1 / 8
_MOST_HOST_BYTES = 32 * GIB
# Without a host tier, what the other tiers need to read and write through.
_STAGING_BYTES = 256 * MIB
# The GPU tier's default: a share of the device's memory, and no more than this.
_GPU_SHARE = 0.02
_MOST_GPU_TOKENS = 65_536

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def is_wanted(config: VllmConfig, settings: CacheSettings) -> bool:
    """Whether there is an embedding cache: a tier is on, and the model and its engine can have one.
    A transfer of embeddings that the user has set up is left alone."""
    on = (
        settings.embedding_cache_gb != 0
        or settings.embedding_cache_dir is not None
        or settings.embedding_cache_url is not None
    )
    model, parallel = config.model_config, config.parallel_config
    if not on or not model.supports_multimodal_inputs or model.is_encoder_decoder:
        return False
    if parallel.nnodes > 1 or parallel.distributed_executor_backend == "ray":
        log.warning("the embedding cache is off: the workers are on several machines")
        return False
    return config.ec_transfer_config is None


def configure(config: VllmConfig, settings: CacheSettings, control: str) -> None:
    """Have vLLM make the connector in each engine. `control`: the address it reports to.

    It is set when vLLM has already checked its configuration: for who only receives embeddings,
    vLLM would let clients send them as well.
    """
    engines = config.parallel_config.data_parallel_size_local or 1
    host = _host_bytes(settings) // engines
    url = settings.embedding_cache_url
    options = CacheOptions(
        host_bytes=host or _STAGING_BYTES,
        disk_directory=_text(settings.embedding_cache_dir),
        disk_bytes=int(settings.embedding_cache_disk_gb * GIB),
        shared_url=url.get_secret_value() if url is not None else None,
        patience_s=settings.embedding_cache_wait_s,
        control=control,
    )
    if config.ec_manager_config.encoder_cache_manager_cls is None:
        announced = AnnouncedEncoderCache
        name = f"{announced.__module__}.{announced.__qualname__}"
        config.ec_manager_config = EncoderCacheManagerConfig(encoder_cache_manager_cls=name)
    config.ec_transfer_config = ECTransferConfig(
        ec_connector=EmbeddingCacheConnector.__name__,
        ec_role="ec_both",
        ec_connector_module_path=EmbeddingCacheConnector.__module__,
        ec_connector_extra_config=options.extra_config(),
    )


def size_gpu_tier(config: VllmConfig, settings: CacheSettings) -> None:
    """Let vLLM's encoder cache hold `encoder_cache_tokens`, and take the memory for those that it
    does not plan with itself from the share of the device that it may use.

    vLLM measures its peak with as many tokens in the cache as one step may have.
    """
    scheduler = config.scheduler_config
    planned = scheduler.encoder_cache_size
    tokens = settings.encoder_cache_tokens
    token_bytes = _embedding_bytes(config)
    if current_platform.is_cpu():
        scheduler.encoder_cache_size = max(planned, tokens or 0)
        return
    device_bytes = current_platform.get_device_total_memory()
    if tokens is None:
        tokens = min(_MOST_GPU_TOKENS, int(device_bytes * _GPU_SHARE) // token_bytes)
    more = max(0, tokens - planned)
    scheduler.encoder_cache_size = planned + more
    config.cache_config.gpu_memory_utilization -= more * token_bytes / device_bytes


def _embedding_bytes(config: VllmConfig) -> int:
    """Bytes of one token in the encoder cache. Encoders with features for several layers of the
    language model (DeepStack) give them side by side."""
    model = config.model_config
    vision: Any = getattr(model.hf_config, "vision_config", None)
    layers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    item: int = getattr(model.dtype, "itemsize", 4)
    return layers * int(model.get_inputs_embeds_size()) * item


def _host_bytes(settings: CacheSettings) -> int:
    if settings.embedding_cache_gb is not None:
        return int(settings.embedding_cache_gb * GIB)
    return min(_MOST_HOST_BYTES, int(memory_bytes() * _HOST_SHARE))


def memory_bytes() -> int:
    """The memory that this process may use: the machine's, or its container's limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            found = min(found, int(limit))
    return found


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())

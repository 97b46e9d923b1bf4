"""Setup of the embedding cache before the engine starts, and when it is disabled."""

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from server.concurrency import usable_memory
from server.engine.arguments import DEMO_MODEL
from server.engine.embedding_cache import setup
from server.engine.embedding_cache.connector import AnnouncedEncoderCache, EmbeddingCacheConnector
from server.errors import CannotStart
from server.settings import GIB, CacheSettings


def configured(repository: Path, **options: Any) -> VllmConfig:
    model = str(repository / "server" / "demo")
    return EngineArgs(model=model, max_model_len=1024, **options).create_engine_config()


def test_vllm_creates_the_configured_connector(repository: Path) -> None:
    config = configured(repository)
    settings = CacheSettings(embedding_cache_gb=0.5, embedding_cache_dir=Path("cache"))
    assert setup.is_wanted(config, settings)
    setup.configure(config, settings, ["ipc://nowhere"])
    transfer = config.ec_transfer_config
    assert transfer is not None
    assert transfer.is_ec_producer
    assert transfer.is_ec_consumer
    assert transfer.ec_connector == EmbeddingCacheConnector.__name__
    assert transfer.ec_connector_extra_config["host_bytes"] == GIB // 2
    assert transfer.ec_connector_extra_config["disk_directory"] == str(Path("cache").absolute())
    assert config.ec_manager_config.get_encoder_cache_manager_obj() is AnnouncedEncoderCache
    multimodal = config.model_config.multimodal_config
    assert multimodal is not None
    assert not multimodal.enable_mm_embeds, "clients must not send embeddings"


def test_engines_divide_the_memory_between_them(repository: Path) -> None:
    config = configured(repository)
    config.parallel_config.data_parallel_size_local = 4
    setup.configure(config, CacheSettings(embedding_cache_gb=1), ["ipc://nowhere"])
    assert config.ec_transfer_config is not None
    assert config.ec_transfer_config.ec_connector_extra_config["host_bytes"] == GIB // 4


def test_the_default_size_is_a_share_of_the_memory(repository: Path) -> None:
    config = configured(repository)
    assert setup.is_wanted(config, CacheSettings())
    setup.configure(config, CacheSettings(), ["ipc://nowhere"])
    assert config.ec_transfer_config is not None
    found = config.ec_transfer_config.ec_connector_extra_config["host_bytes"]
    assert found == min(32 * GIB, usable_memory() // 8)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_mm_profiling": True},
        {"limit_mm_per_prompt": {"image": 0, "video": 0}},
    ],
)
def test_the_cache_is_disabled_if_the_encoder_cannot_be_measured(
    repository: Path, options: dict[str, Any]
) -> None:
    assert not setup.is_wanted(configured(repository, **options), CacheSettings())


def test_the_cache_is_disabled_if_every_tier_is_off(repository: Path) -> None:
    config = configured(repository)
    assert not setup.is_wanted(config, CacheSettings(embedding_cache_gb=0))
    shared = CacheSettings(embedding_cache_gb=0, embedding_cache_url="redis://cache")
    assert setup.is_wanted(config, shared)


def test_the_cache_is_disabled_for_a_runner_that_loses_reports(repository: Path) -> None:
    config = configured(repository)
    assert not config.use_v2_model_runner
    config.parallel_config.pipeline_parallel_size = 2
    assert not setup.is_wanted(config, CacheSettings())


def test_the_gpu_encoder_cache_is_only_enlarged(repository: Path) -> None:
    config = configured(repository)
    planned = config.scheduler_config.encoder_cache_size
    setup.size_gpu_tier(config, CacheSettings())
    assert config.scheduler_config.encoder_cache_size == planned
    setup.size_gpu_tier(config, CacheSettings(encoder_cache_tokens=planned + 100))
    assert config.scheduler_config.encoder_cache_size == planned + 100


def test_an_engine_that_only_encodes_needs_a_tier_that_others_read() -> None:
    url = CacheSettings(encode_only=True, embedding_cache_url="redis://cache")
    arguments = AsyncEngineArgs(str(DEMO_MODEL))
    setup.encode_only(arguments, CacheSettings())
    assert arguments.ec_transfer_config is None
    with pytest.raises(CannotStart, match="requires --embedding-cache-url"):
        setup.encode_only(arguments, CacheSettings(encode_only=True))
    setup.encode_only(arguments, url)
    config = arguments.create_engine_config()
    assert config.is_mm_encoder_only
    assert setup.is_wanted(config, url)
    with pytest.raises(CannotStart, match="exclude each other"):
        setup.encode_only(arguments, url)

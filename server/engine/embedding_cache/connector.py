"""The connector class, which vLLM creates in the scheduler's process and in each worker."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from server.engine.embedding_cache.arena import Arena
from server.engine.embedding_cache.control import (
    Action,
    Clear,
    ControlClient,
    ExpectReset,
    Prefetch,
    Snapshot,
)
from server.engine.embedding_cache.disk import DiskTier
from server.engine.embedding_cache.identity import UnknownWeights, namespace
from server.engine.embedding_cache.scheduler import Scheduler
from server.engine.embedding_cache.shared import SharedTier
from server.engine.embedding_cache.store import READERS, WRITERS, EmbeddingStore
from server.engine.embedding_cache.tier import Tier
from server.engine.embedding_cache.worker import Orders, Report, Worker
from server.engine.vllm_adapter import encode_only

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("saccade.embeddings")

# How long after its announcement a reset of vLLM's encoder cache is expected.
_RESET_WITHIN_S = 10.0
# Called when vLLM resets the encoder cache of the scheduler in this process.
reset_listeners: list[Callable[[], None]] = []


@dataclass(frozen=True)
class CacheOptions:
    """The server's options for its connectors, passed in the extra configuration of vLLM's
    transfer.

    Sizes are in bytes for one engine. `patience_s` is how long a request waits for the lower tiers;
    `controls` are the addresses of the control sockets, one in each front end of the server.
    `host_memory` is the file of the `LastingMemory` with the host tier, if it outlives the engine.
    """

    host_bytes: int
    disk_directory: str | None
    disk_bytes: int
    shared_url: str | None
    patience_s: float
    controls: tuple[str, ...]
    host_memory: str | None = None

    def extra_config(self) -> dict[str, Any]:
        return asdict(self)


class AnnouncedEncoderCache(EncoderCacheManager):
    """vLLM's encoder cache manager, which also calls `reset_listeners`.

    vLLM resets it in several places when the weights have changed, without a call to the connector.
    """

    def reset(self) -> None:
        super().reset()
        for listener in reset_listeners:
            listener()


class EmbeddingCacheConnector(ECConnectorBase):
    """Passes vLLM's calls to the scheduler or worker part, depending on the process."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        assert vllm_config.ec_transfer_config is not None
        if role is ECConnectorRole.WORKER:
            self._worker = Worker()
            if not self.is_consumer:
                encode_only.install()
            return
        options = CacheOptions(**vllm_config.ec_transfer_config.ec_connector_extra_config)
        arena = Arena(options.host_bytes, options.host_memory)
        self._store = EmbeddingStore(arena, _tiers(vllm_config, options))
        self._scheduler = Scheduler(vllm_config, self._store, options.patience_s)
        self._reset_expected_until = 0.0
        reset_listeners.append(self._was_reset)
        engine = str(vllm_config.parallel_config.data_parallel_index)
        self._controls = [
            ControlClient(address, engine, self._execute, self._snapshot)
            for address in options.controls
        ]

    def shutdown(self) -> None:
        if self.role is ECConnectorRole.SCHEDULER:
            for control in self._controls:
                control.stop()
            self._store.close()
            self._store.arena.close()

    # ------------------------------------------------------------------ in the workers

    def start_save_caches(self, **kwargs: Any) -> None:
        if not self.is_consumer:  # nothing reads embeddings here, so vLLM loads none
            self._worker.skip_loads(self._orders())

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._worker.load(self._orders(), encoder_cache)

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        embedding = encoder_cache[mm_hash]
        if embedding.untyped_storage().nbytes() > embedding.nbytes:
            # A view of a batch would keep the whole batch in memory.
            embedding = encoder_cache[mm_hash] = embedding.clone()
        self._worker.save(self._orders(), mm_hash, embedding)

    def build_connector_worker_meta(self) -> ECConnectorWorkerMetadata | None:
        report = self._worker.report(self._orders())
        return report if report.loaded or report.saved else None  # most steps have no image

    def _orders(self) -> Orders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        return orders

    # ------------------------------------------------------------------ in the scheduler

    def ensure_cache_available(self, request: "Request", num_computed_tokens: int) -> bool:
        return self._scheduler.ensure(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler.has(identifier)

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        self._scheduler.allocated(request, index)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> ECConnectorMetadata:
        return self._scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: "ECConnectorOutput") -> None:
        report = connector_output.ec_connector_worker_meta
        if isinstance(report, Report):
            self._scheduler.reported(report)

    def request_finished(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finished(request)

    # ------------------------------------------------------------------ for the server

    def _execute(self, action: Action) -> None:
        match action:
            case Prefetch(images):
                for name, tokens in images:
                    if (spec := self._scheduler.spec("image", tokens)) is not None:
                        self._store.prefetch(name, spec)
            case ExpectReset():
                self._reset_expected_until = time.monotonic() + _RESET_WITHIN_S
            case Clear():
                self._store.clear()

    def _was_reset(self) -> None:
        """Handle a reset of vLLM's encoder cache. Unless it was announced, the weights have
        changed, and the lower tiers, whose names depend on the old weights, must no longer be
        used."""
        self._scheduler.forget_gpu()
        expected = time.monotonic() < self._reset_expected_until
        self._reset_expected_until = 0.0
        if expected:
            return
        log.warning(
            "vLLM reset its encoder cache: from now on, embeddings are only cached in memory"
        )
        self._store.detach()

    def _snapshot(self) -> Snapshot:
        return {"gpu": self._scheduler.gpu_snapshot(), **self._store.snapshot()}


def _tiers(config: VllmConfig, options: CacheOptions) -> list[Tier]:
    """The tiers that outlive this process, fastest first."""
    if options.disk_directory is None and options.shared_url is None:
        return []
    try:
        name = namespace(config)
    except UnknownWeights as error:
        log.error("the embedding cache uses neither disk nor shared store: %s", error)
        return []
    tiers: list[Tier] = []
    if options.disk_directory is not None:
        try:
            tiers.append(DiskTier(Path(options.disk_directory), name, options.disk_bytes))
        except OSError as error:
            log.error("the embedding cache does not use the disk: %s", error)
    if options.shared_url is not None:
        # One more for a clear that is tried again.
        tiers.append(SharedTier(options.shared_url, name, READERS + WRITERS + 1))
    return tiers

"""The worker's part: copies between vLLM's encoder cache and the arena, by the scheduler's orders
for each step of the engine."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorMetadata,
    ECConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from server.engine.embedding_cache.arena import ArenaName, attach
from server.engine.embedding_cache.directory import Extents
from server.engine.embedding_cache.tier import Spec

log = logging.getLogger("saccade.embeddings")

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Orders(ECConnectorMetadata):
    """The copies of one step, by name of the image: `loads` from the arena, `saves` into it."""

    arena: ArenaName
    loads: dict[str, tuple[Extents, Spec]] = field(default_factory=dict)
    saves: dict[str, tuple[Extents, Spec]] = field(default_factory=dict)


@dataclass
class Report(ECConnectorWorkerMetadata):
    """The copies that were made: names of loads, and name -> success of saves."""

    loaded: list[str] = field(default_factory=list)
    saved: dict[str, bool] = field(default_factory=dict)

    def aggregate(self, other: ECConnectorWorkerMetadata) -> "Report":
        assert isinstance(other, Report)
        self.loaded += other.loaded
        self.saved |= other.saved
        return self


class Worker:
    """Executes orders. Every worker loads; of the workers that share a model, which have equal
    embeddings, the first one saves."""

    def __init__(self) -> None:
        self._memory: tuple[ArenaName, torch.Tensor] | None = None
        self._report = Report()

    def load(self, orders: Orders, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Copy the ordered embeddings into the encoder cache."""
        for name, (extents, spec) in orders.loads.items():
            if name not in encoder_cache:
                with gpu_sync_allowed():
                    encoder_cache[name] = self._tensor(orders.arena, extents, spec).to(_device())
            self._report.loaded.append(name)

    def skip_loads(self, orders: Orders) -> None:
        """Report the ordered loads without copying anything."""
        self._report.loaded += orders.loads

    def save(self, orders: Orders, name: str, embedding: torch.Tensor) -> None:
        """Copy an output of the encoder to the arena if that was ordered and its shape is as
        expected."""
        if name not in orders.saves or get_tensor_model_parallel_rank() != 0:
            return
        extents, spec = orders.saves[name]
        fits = (
            embedding.dtype == DTYPES[spec.dtype]
            and tuple(embedding.shape) == (spec.rows, spec.width)
        )  # fmt: skip
        if fits:
            source = embedding.detach().contiguous().flatten().view(torch.uint8)
            at = 0
            with gpu_sync_allowed():
                for piece in self._pieces(orders.arena, extents):
                    piece.copy_(source[at : at + len(piece)])
                    at += len(piece)
        else:
            log.warning(
                "not caching an encoder output of unexpected type or shape: %s, %s",
                embedding.dtype, tuple(embedding.shape),
            )  # fmt: skip
        self._report.saved[name] = fits

    def report(self, orders: Orders) -> Report:
        """The copies since the last report. Ordered saves that did not happen count as failed."""
        report, self._report = self._report, Report()
        if get_tensor_model_parallel_rank() == 0:
            for name in orders.saves.keys() - report.saved.keys():
                report.saved[name] = False
        return report

    def _tensor(self, arena: ArenaName, extents: Extents, spec: Spec) -> torch.Tensor:
        """A copy of an entry, on the CPU."""
        flat = torch.cat(self._pieces(arena, extents))
        return flat.view(DTYPES[spec.dtype]).view(spec.rows, spec.width)

    def _pieces(self, arena: ArenaName, extents: Extents) -> list[torch.Tensor]:
        if self._memory is None or self._memory[0] != arena:
            self._memory = arena, torch.frombuffer(attach(arena), dtype=torch.uint8)
        memory = self._memory[1]
        return [memory[offset : offset + length] for offset, length in extents]


def _device() -> Any:
    """The device of this worker's encoder cache."""
    if current_platform.is_cuda_alike():
        return torch.device(current_platform.device_type, current_platform.current_device())
    return current_platform.device_type

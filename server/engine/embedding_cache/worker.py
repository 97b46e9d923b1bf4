"""The worker's half: copies between the encoder cache of vLLM and the arena."""

import logging
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from server.engine.embedding_cache.arena import ArenaName, Extents, attach
from server.engine.embedding_cache.entries import Spec
from server.engine.embedding_cache.messages import DTYPES, Orders, Report

log = logging.getLogger("saccade.embeddings")


class Worker:
    """Every worker loads. Those that share a model have equal embeddings: the first one saves."""

    def __init__(self) -> None:
        self._memory: tuple[ArenaName, torch.Tensor] | None = None
        self._report = Report()

    def load(self, orders: Orders, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put the embeddings that the scheduler counts on into the encoder cache."""
        for name, (extents, spec) in orders.loads.items():
            if name not in encoder_cache:
                with gpu_sync_allowed():
                    encoder_cache[name] = self._tensor(orders.arena, extents, spec).to(_device())
            self._report.loaded.append(name)

    def save(self, orders: Orders, name: str, embedding: torch.Tensor) -> None:
        """Copy what the encoder made, if there is room for it, and if it is what was expected."""
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
                "the encoder made %s of %s, which cannot be cached",
                embedding.dtype, tuple(embedding.shape),
            )  # fmt: skip
        self._report.saved[name] = fits

    def report(self, orders: Orders) -> Report:
        """What was done since the last one; saves that were not come as failed."""
        report, self._report = self._report, Report()
        if get_tensor_model_parallel_rank() == 0:
            for name in orders.saves.keys() - report.saved.keys():
                report.saved[name] = False
        return report

    def _tensor(self, arena: ArenaName, extents: Extents, spec: Spec) -> torch.Tensor:
        """A copy, on the CPU."""
        flat = torch.cat(self._pieces(arena, extents))
        return flat.view(DTYPES[spec.dtype]).view(spec.rows, spec.width)

    def _pieces(self, arena: ArenaName, extents: Extents) -> list[torch.Tensor]:
        if self._memory is None or self._memory[0] != arena:
            self._memory = arena, torch.frombuffer(attach(arena), dtype=torch.uint8)
        memory = self._memory[1]
        return [memory[offset : offset + length] for offset, length in extents]


def _device() -> Any:
    """The device of this worker, where its encoder cache is."""
    if current_platform.is_cuda_alike():
        return torch.device(current_platform.device_type, current_platform.current_device())
    return current_platform.device_type

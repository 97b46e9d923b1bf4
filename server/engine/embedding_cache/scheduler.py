"""The scheduler's part: decides which embeddings are loaded and saved, and counts.

In each pass, vLLM's scheduler calls `ensure` for each request (may it be scheduled?), then `has`
for each image that is not on the GPU, then `allocated` for each image that is scheduled. `orders`
ends the pass; `reported` is called when the workers have executed the orders.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from server.engine.embedding_cache.index import Entry
from server.engine.embedding_cache.store import EmbeddingStore
from server.engine.embedding_cache.tier import Counts, Spec
from server.engine.embedding_cache.worker import DTYPE_NAMES, Orders, Report

ENCODED = "saccade_encoded"
# The modalities whose items are reported, in this order.
_SHOWN = ("image", "video")


@dataclass
class _Progress:
    """One request: when it was first seen, how many of its tokens were in the KV cache then, and
    the indices of its images that were allocated and encoded."""

    since: float
    from_kv: int
    allocated: set[int]
    encoded: set[int]


class _Held(NamedTuple):
    """The space of an image on the GPU."""

    tokens: int
    nbytes: int


class Scheduler:
    """`patience_s` is the total time, in seconds, that a request waits for the lower tiers."""

    def __init__(self, config: VllmConfig, store: EmbeddingStore, patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        self._dtype = DTYPE_NAMES.get(cast(torch.dtype, config.model_config.dtype))
        assert config.ec_transfer_config is not None
        self._widths = config.ec_transfer_config.mm_encoder_output_widths
        self._gpu_tokens = config.scheduler_config.encoder_cache_size
        self._requests: dict[str, _Progress] = {}
        self._wanted: dict[str, Spec] = {}
        self._held: dict[str, Entry] = {}
        self._loads: dict[str, Entry] = {}
        self._saves: dict[str, Entry] = {}
        self._loading: dict[str, list[Entry]] = {}
        self._saving: dict[str, list[Entry]] = {}
        self._on_gpu: dict[str, _Held] = {}
        self._new_on_gpu: dict[str, _Held] = {}
        self._gpu_counts = Counts()

    def spec(self, modality: str, rows: int) -> Spec | None:
        """The tensor for `rows` tokens of an item; None if it cannot be cached."""
        width = self._widths.get(modality)
        if width is None or self._dtype is None or not rows:
            return None
        return Spec(self._dtype, rows, width)

    def _spec_of(self, feature: MultiModalFeatureSpec) -> Spec | None:
        if feature.mm_hash is not None and feature.identifier != feature.mm_hash:
            return None  # made with a LoRA adapter, whose weights the cache does not know
        return self.spec(feature.modality, feature.mm_position.get_num_embeds())

    # ------------------------------------------------------------------ one pass

    def ensure(self, request: Request, computed_tokens: int) -> bool:
        """Whether `request` may be scheduled: False while its entries are being read from the lower
        tiers, unless it has waited too long."""
        progress = self._progress(request, computed_tokens)
        waits = False
        for feature in request.mm_features:
            name, place = feature.identifier, feature.mm_position
            if place.offset + place.length <= computed_tokens:
                continue
            if (spec := self._spec_of(feature)) is not None:
                self._wanted[name] = spec
                waits |= name not in self._on_gpu and not self._store.settled(name, spec)
        return not waits or time.monotonic() - progress.since > self._patience_s

    def has(self, name: str) -> bool:
        """Whether the image can be loaded. If so, it is pinned until `orders`."""
        spec = self._wanted.get(name)
        if (known := self._held.get(name) or self._loads.get(name)) is not None:
            return known.spec == spec
        entry = self._store.take(name, spec) if spec is not None else None
        if entry is not None:
            self._held[name] = entry
        return entry is not None

    def allocated(self, request: Request, index: int) -> None:
        """The image `index` of `request` was given space on the GPU, to be loaded or encoded."""
        feature = request.mm_features[index]
        name, progress = feature.identifier, self._progress(request, 0)
        progress.allocated.add(index)
        self._gpu_counts.add("misses")
        spec = self._spec_of(feature)
        tokens = feature.mm_position.get_num_embeds()
        self._new_on_gpu[name] = _Held(tokens, spec.nbytes if spec else 0)
        entry = self._held.get(name)
        if entry is not None and entry.spec == spec:
            del self._held[name]
            self._store.used(entry)
            self._loads[name] = entry
            return
        progress.encoded.add(index)
        if spec is not None and (room := self._store.reserve(name, spec)) is not None:
            self._saves[name] = room

    def orders(self, output: SchedulerOutput) -> Orders:
        """The copies that the workers make in the step that was just scheduled. If the step has no
        tokens, workers do not run it, and the orders wait for the next step."""
        for name in output.free_encoder_mm_hashes:
            if self._on_gpu.pop(name, None) is not None:
                self._gpu_counts.add("evictions")
        self._on_gpu |= self._new_on_gpu
        for entry in self._held.values():
            self._store.release(entry)
        for passing in (self._new_on_gpu, self._held, self._wanted):
            passing.clear()
        if not output.total_num_scheduled_tokens:
            return Orders(self._store.arena.name)
        orders = Orders(
            self._store.arena.name,
            {name: (entry.extents, entry.spec) for name, entry in self._loads.items()},
            {name: (entry.extents, entry.spec) for name, entry in self._saves.items()},
        )
        for name, entry in self._loads.items():
            self._loading.setdefault(name, []).append(entry)
        for name, entry in self._saves.items():
            self._saving.setdefault(name, []).append(entry)
        self._loads.clear()
        self._saves.clear()
        return orders

    def reported(self, report: Report) -> None:
        """The workers have executed the orders of a step."""
        for name in set(report.loaded):
            if (entry := _pop_first(self._loading, name)) is not None:
                self._store.release(entry)
        for name, done in report.saved.items():
            if (entry := _pop_first(self._saving, name)) is not None:
                (self._store.commit if done else self._store.abandon)(entry)

    # ------------------------------------------------------------------ requests and counts

    def finished(self, request: Request) -> dict[str, Any] | None:
        """For each image of `request`, and then for each video, whether the encoder ran for it."""
        progress = self._requests.pop(request.request_id, None)
        if progress is None or not request.mm_features:
            return None
        for index, feature in enumerate(request.mm_features):
            place = feature.mm_position
            computed = place.offset + place.length <= request.num_computed_tokens
            from_kv = place.offset + place.length <= progress.from_kv
            if computed and not from_kv and index not in progress.allocated:
                self._gpu_counts.add("hits")
        numbered = list(enumerate(request.mm_features))
        media = [i for kind in _SHOWN for i, item in numbered if item.modality == kind]
        return {ENCODED: [index in progress.encoded for index in media]}

    def forget_gpu(self) -> None:
        """vLLM has reset its encoder cache."""
        self._on_gpu.clear()

    def gpu_snapshot(self) -> dict[str, Any]:
        held = self._on_gpu.copy().values()  # called in a thread beside the scheduler's
        return self._gpu_counts.snapshot() | {
            "entries": len(held),
            "bytes": sum(item.nbytes for item in held),
            "tokens": sum(item.tokens for item in held),
            "max_tokens": self._gpu_tokens,
        }  # fmt: skip

    def _progress(self, request: Request, computed_tokens: int) -> _Progress:
        progress = self._requests.get(request.request_id)
        if progress is None:
            progress = _Progress(time.monotonic(), computed_tokens, set(), set())
            self._requests[request.request_id] = progress
        return progress


def _pop_first(waiting: dict[str, list[Entry]], name: str) -> Entry | None:
    """Remove and return the entry that was ordered first. After a clear, a name may be ordered
    again before the earlier step is reported."""
    entries = waiting.get(name)
    if not entries:
        return None
    entry = entries.pop(0)
    if not entries:
        del waiting[name]
    return entry

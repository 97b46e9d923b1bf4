"""Keeps the two halves of vLLM's processor cache in one order.

vLLM remembers processed images twice: the front end (P0) remembers which keys the engine (P1)
holds, the engine holds the features. An image that P0 knows is sent without its features, so both
halves must see the same keys in the same order. vLLM updates P0 while a request is rendered; if
the request is then refused or cancelled before it is sent, P0 knows an image that never reached
the engine, and the next request with that image fails.

Here P0 is only read while a request is rendered. It is updated at the moment of sending, by
`Settled`: there is no await between the update and the message, and if the message
is not sent, the update is taken back.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cachetools
import torch
from vllm.exceptions import RetryableRequestError
from vllm.multimodal.cache import (
    BaseMultiModalProcessorCache,
    MultiModalProcessorOnlyCache,
)
from vllm.multimodal.cache import lru as vllm_lru
from vllm.multimodal.cache.base import MultiModalCache, MultiModalProcessorCacheItemMetadata
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)
from vllm.utils.cache import CacheInfo
from vllm.v1.engine import EngineCoreRequest

from server.engine.vllm_adapter.processors import Updates
from server.telemetry import metrics

_MIN_REMEMBERED = 4096


@dataclass(frozen=True)
class CacheSize:
    """Entries and bytes of a cache; None for what it cannot tell."""

    entries: int
    bytes: int | None
    max_bytes: int | None


class PooledItem(MultiModalKwargsItem):
    """One image's features on their way to the engine.

    Empty when the engine was known to hold them; `refill` computes them all the same, for the
    case that the engine's cache has dropped them by the time the request is sent. `elements`, if
    known, are the features as `item_encoder.py` encodes them; tensors are then made only for whom
    looks at them.
    """

    refill: Callable[[], Awaitable["PooledItem"]] | None = None
    elements: Sequence[Any] | None = None
    _make: Callable[[], dict[str, MultiModalFieldElem]] | None = None
    _made: dict[str, MultiModalFieldElem]

    @classmethod
    def of(
        cls, elements: Sequence[Any], make: Callable[[], dict[str, MultiModalFieldElem]]
    ) -> "PooledItem":
        """An item with `elements`; `make` makes the same of tensors."""
        item = cls()
        item.elements, item._make = elements, make
        return item

    @property
    def data(self) -> dict[str, MultiModalFieldElem]:
        """The features by name."""
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made

    @data.setter
    def data(self, made: dict[str, MultiModalFieldElem]) -> None:
        self._made = made

    def __len__(self) -> int:
        return len(self._made if self._make is None else self.elements or ())

    def take(self, features: "PooledItem") -> None:
        """Hold `features`."""
        self._made, self._make = dict(features._made), features._make
        self.elements = features.elements

    def let_go(self) -> None:
        """Free everything that it holds."""
        self._made = {}
        self._make = self.refill = self.elements = None


def install() -> None:
    """Let vLLM's cache learn the size of an item from its elements."""
    lru: Any = vllm_lru
    lru.MultiModalProcessorCacheItemMetadata = _Metadata


class _Metadata(MultiModalProcessorCacheItemMetadata):
    """What vLLM's cache keeps of an item, without making tensors to learn their size."""

    def __init__(self, item: MultiModalKwargsItem, prompt_updates: Updates) -> None:
        if not isinstance(item, PooledItem) or item.elements is None:
            super().__init__(item, prompt_updates)
            return
        self.item_size = sum(len(element.data) for element in item.elements)
        self.prompt_updates = prompt_updates


class ProcessorCache(BaseMultiModalProcessorCache):
    """Stands in for vLLM's P0 cache: reads it at once, updates it when a request is sent."""

    def __init__(self, cache: BaseMultiModalProcessorCache) -> None:
        self._cache = cache
        # Without a P1 half (several engines) the cache itself holds the features.
        self._keeps_data = isinstance(cache, MultiModalProcessorOnlyCache)
        # Prompt updates of images that were processed; also of some that P0 no longer knows.
        self._updates: dict[str, Updates] = {}
        self._prune_at = _MIN_REMEMBERED

    # ------------------------------------------------------------------ while rendering

    def is_cached_item(self, mm_hash: str) -> bool:
        return mm_hash in self._updates and self._cache.is_cached_item(mm_hash)

    def updates(self, mm_hash: str) -> Updates | None:
        """The prompt updates of an image; None if it is not cached."""
        updates = self._updates.get(mm_hash)  # vLLM's own thread may clear the cache meanwhile
        return updates if updates is not None and self._cache.is_cached_item(mm_hash) else None

    def remember(self, mm_hash: str, updates: Updates) -> None:
        """Keep the prompt updates of an image for when it is found cached."""
        self._updates[mm_hash] = updates
        if len(self._updates) > self._prune_at:
            known = list(self._updates.items())  # vLLM's own thread may add to it meanwhile
            kept = {h: u for h, u in known if self._cache.is_cached_item(h)}
            self._updates = kept
            self._prune_at = max(_MIN_REMEMBERED, 2 * len(kept))

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        """vLLM's own path comes by here; the real update waits for `settle`."""
        if mm_item is None:
            return None, self._updates[mm_hash]
        self.remember(mm_hash, mm_item[1])
        return mm_item

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        """Order changes only in `settle`."""

    # ------------------------------------------------------------------ when sending

    def settled(self, request: EngineCoreRequest, *, last: bool) -> "Settled":
        """See `Settled`. `last`: no other engine request will be sent with the same features,
        which are then freed."""
        return Settled(self, request, last=last)

    def missing(self, features: Sequence[MultiModalFeatureSpec]) -> list[MultiModalFeatureSpec]:
        """Those of `features` that must be sent with their data and have none: the engine does
        not hold them, or will not by the time it comes to them, because other images of the same
        request push them out."""
        empty = [feature for feature in features if not feature.data]
        if not empty:
            return []
        if len(empty) == len(features) or (lru := self._lru) is None:
            return [feature for feature in empty if not self._cache.is_cached_item(_key(feature))]
        # All images of a request are touched first, so those of others are pushed out before them.
        held = {key: _size_in(lru, key) for key in map(_key, features) if key in lru}
        for key in map(_key, features):
            if key in held:
                held[key] = held.pop(key)
        missing = []
        for feature in features:
            key = _key(feature)
            if key in held:
                held[key] = held.pop(key)
            elif not feature.data:
                missing.append(feature)
            elif (size := MultiModalCache.get_item_size(feature.data)) <= lru.maxsize:
                while sum(held.values()) + size > lru.maxsize:
                    del held[next(iter(held))]
                held[key] = size
        return missing

    def let_go(self, features: Sequence[MultiModalFeatureSpec]) -> None:
        """Free what a sent request would hold until its answer is complete: features and bytes."""
        for feature in features:
            if isinstance(feature.data, PooledItem) and self._cache.is_cached_item(_key(feature)):
                feature.data.let_go()

    @property
    def _lru(self) -> Any:
        """vLLM's `LRUCache` of keys; None where it keeps items in shared memory, which pushes out
        none of those that it has touched."""
        return getattr(self._cache, "_cache", None)

    def settle(
        self, features: Sequence[MultiModalFeatureSpec]
    ) -> tuple[list[MultiModalFeatureSpec], list[str]]:
        """Update P0 for `features` as the engine will update P1 when it receives them.

        Returns the features to send, without the data that the engine holds, and the keys that
        are new to P0.
        """
        for feature in features:
            self._cache.touch_sender_cache_item(_key(feature))
        settled, fresh = [], []
        before = self._entries()
        try:
            for feature in features:
                key = _key(feature)
                known = self._cache.is_cached_item(key)
                kept = self._to_keep(feature) if feature.data else None
                item = None if kept is None else (kept, self._updates.get(key, ()))
                data, _ = self._cache.get_and_update_item(item, key)
                settled.append(replace(feature, data=data))
                if not known:
                    fresh.append(key)
        except BaseException:
            self.take_back(fresh)
            raise
        finally:
            self._cache.release_sender_touches()
        if (evicted := before + len(fresh) - self._entries()) > 0:
            metrics.features_evicted.inc(evicted)
        return settled, fresh

    def _to_keep(self, feature: MultiModalFeatureSpec) -> MultiModalKwargsItem:
        """What the cache may keep of a feature: never memory that is lent for one request."""
        assert feature.data is not None
        if self._keeps_data and isinstance(feature.data, PooledItem):
            return copied(feature.data)
        return feature.data

    def take_back(self, keys: Sequence[str]) -> None:
        """Forget `keys`, which the engine may not have received."""
        for key in keys:
            self._cache.invalidate(key)

    # ------------------------------------------------------------------ the rest

    def clear_cache(self) -> None:
        self._updates.clear()
        self._cache.clear_cache()

    def invalidate(self, mm_hash: str) -> None:
        self._cache.invalidate(mm_hash)

    def validate_input_item(self, mm_item: MultiModalKwargsItem, mm_hash: str) -> None:
        self._cache.validate_input_item(mm_item, mm_hash)

    def size(self) -> CacheSize:
        """What the engine holds of images' features, as far as it is known here."""
        if (lru := self._lru) is None:
            return CacheSize(self._entries(), None, None)
        return CacheSize(self._entries(), int(lru.currsize), int(lru.maxsize))

    def _entries(self) -> int:
        if (lru := self._lru) is not None:
            return len(lru)
        cache: Any = self._cache
        return len(cache._shm_cache.key_index)

    def make_stats(self, *, delta: bool = False) -> CacheInfo:
        return self._cache.make_stats(delta=delta)

    def close(self) -> None:
        self._cache.close()


class Settled:
    """`async with` it, P0 is updated for a request, which the caller sends in the body, without
    awaiting anything before that. If it is not sent, the update is taken back."""

    def __init__(self, cache: ProcessorCache, request: EngineCoreRequest, *, last: bool) -> None:
        self._cache = cache
        self._request = request
        self._features = request.mm_features or []
        self._last = last
        self._new: list[str] = []

    async def __aenter__(self) -> None:
        """Raises RetryableRequestError if an image was dropped from the cache while the request was
        rendered, and only the client can send it again."""
        while missing := self._cache.missing(self._features):
            await _refill(missing)
        self._request.mm_features, self._new = self._cache.settle(self._features)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._cache.take_back(self._new)
        elif self._last:
            self._cache.let_go(self._features)


def copied(item: MultiModalKwargsItem) -> MultiModalKwargsItem:
    """A copy of `item` in memory of its own."""
    return MultiModalKwargsItem(
        {name: replace(elem, data=_copy(elem.data)) for name, elem in item.items()}
    )


def _copy(data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return data.clone()
    return [_copy(item) for item in data] if isinstance(data, list | tuple) else data


def _key(feature: MultiModalFeatureSpec) -> str:
    return feature.mm_hash or feature.identifier


def _size_in(lru: Any, key: str) -> int:
    """The bytes of an item, without making it the one that was used last."""
    return int(lru.getsizeof(cachetools.Cache.__getitem__(lru, key)))


async def _refill(features: Sequence[MultiModalFeatureSpec]) -> None:
    for feature in features:
        item = feature.data
        if not isinstance(item, PooledItem) or item.refill is None:
            raise RetryableRequestError("an image left the cache meanwhile; send it again")
        if not item:
            item.take(await item.refill())

"""The image cache where the front end itself holds the features, as with several engines."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.cache import LruKeyReplicatedSenderCache, MultiModalProcessorOnlyCache
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalSharedField,
    PlaceholderRange,
)

from server.engine.vllm_adapter.processor_cache import PooledItem, ProcessorCache, send


def feature(item: PooledItem | None) -> MultiModalFeatureSpec:
    position = PlaceholderRange(offset=0, length=1)
    return MultiModalFeatureSpec(
        data=item, modality="image", identifier="k", mm_position=position, mm_hash="k"
    )


def picture() -> PooledItem:
    data = torch.arange(8)
    return PooledItem(
        {"x": MultiModalFieldElem(data=data, field=MultiModalSharedField(batch_size=1))}
    )


def test_features_stay_after_a_request_let_them_go() -> None:
    config: Any = SimpleNamespace(
        get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=0.01)
    )
    cache = ProcessorCache(MultiModalProcessorOnlyCache(config))
    cache.remember("k", ())
    sent: list[Any] = []

    async def core(request: Any) -> None:
        sent.append(request.mm_features[0].data)

    item = picture()
    lent = item["x"].data
    request: Any = SimpleNamespace(mm_features=[feature(item)])
    asyncio.run(send(cache, core, request))
    assert not item  # what was lent for the request is free again
    again: Any = SimpleNamespace(mm_features=[feature(PooledItem())])
    asyncio.run(send(cache, core, again))
    for data in sent:
        assert torch.equal(data["x"].data, torch.arange(8))
        assert data["x"].data.data_ptr() != lent.data_ptr()


def test_an_unsent_request_leaves_no_trace() -> None:
    config: Any = SimpleNamespace(
        get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=0.01)
    )
    cache = ProcessorCache(LruKeyReplicatedSenderCache(config))
    cache.remember("k", ())

    async def broken(request: Any) -> None:
        raise ConnectionError

    request: Any = SimpleNamespace(mm_features=[feature(picture())])
    with pytest.raises(ConnectionError):
        asyncio.run(send(cache, broken, request))
    assert not cache.is_cached_item("k")

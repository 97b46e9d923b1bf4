"""Features of images on their way from fronts to engines."""

from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import ModelConfig
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder

from server.engine.arguments import DEMO_MODEL
from server.engine.vllm_adapter.item_frames import Features, ItemFrames, Repeats

pytest.importorskip("ray")
from server.scale.features import fold, unfold

REPEATS = Repeats(frames=2, nbytes=256)


@pytest.fixture(scope="module")
def encoder() -> ItemFrames:
    return ItemFrames(ModelConfig(str(DEMO_MODEL)))


def item(seed: int, patches: int = 64) -> MultiModalKwargsItem:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (patches, 1536), dtype=torch.uint8, generator=generator)
    fields = {"pixel_values": pixels, "image_grid_thw": torch.tensor([1, 8, patches // 8])}
    field = MultiModalBatchedField()
    return MultiModalKwargsItem(
        {name: MultiModalFieldElem(data=data, field=field) for name, data in fields.items()}
    )


def request(*items: MultiModalKwargsItem) -> EngineCoreRequest:
    features = [
        MultiModalFeatureSpec(
            data=each, modality="image", identifier=str(n), mm_position=PlaceholderRange(n, 1)
        )
        for n, each in enumerate(items)
    ]
    return EngineCoreRequest(
        request_id="a",
        prompt_token_ids=[1, 2, 3],
        mm_features=features,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_features_are_told_apart_and_what_is_kept_of_them_stays(encoder: ItemFrames) -> None:
    first, second = item(1), item(2)
    frames = encoder.frames(request(first, second))
    assert [type(frame) is Features for frame in frames] == [False, True, True]
    found: list[Any] = frames[1:]
    assert all(each.repeats == REPEATS and each.nbytes == 64 * 1536 for each in found)
    found[0].kept["here"] = 1
    again: list[Any] = encoder.frames(request(second, first))
    assert [frame.kept for frame in again[1:]] == [{}, {"here": 1}]


def test_the_engine_reads_the_same_request(encoder: ItemFrames) -> None:
    sent = request(item(1), item(2))
    buffers: list[Any] = []
    for frame in encoder.frames(sent):
        buffers += frame.buffers if isinstance(frame, Features) else [frame]
    read = MsgpackDecoder(EngineCoreRequest).decode(buffers)
    assert read.mm_features is not None
    assert sent.mm_features is not None
    for theirs, ours in zip(read.mm_features, sent.mm_features, strict=True):
        assert theirs.data is not None
        assert ours.data is not None
        for name, element in ours.data.items():
            assert torch.equal(theirs.data[name].data, element.data)


def patches(frames: int, *, equal: bool, nbytes: int = 256) -> np.ndarray[Any, Any]:
    first = np.random.default_rng(0).integers(0, 256, (500, 1, nbytes), dtype=np.uint8)
    whole = np.repeat(first, frames, axis=1)
    if not equal:
        whole[-1, -1, -1] ^= 1
    return whole.reshape(-1)


@pytest.mark.parametrize(("frames", "nbytes"), [(2, 256), (2, 196), (3, 49)])
def test_equal_frames_travel_once(frames: int, nbytes: int) -> None:
    repeats, whole = Repeats(frames, nbytes), patches(frames, equal=True, nbytes=nbytes)
    folded = fold(whole, repeats)
    assert folded is not None
    assert folded.nbytes * frames == whole.nbytes
    assert np.array_equal(unfold(folded, repeats), whole)


@pytest.mark.parametrize(
    "array", [patches(2, equal=False), patches(2, equal=True)[:-1], np.zeros(0, np.uint8)]
)
def test_other_features_are_left_as_they_are(array: np.ndarray[Any, Any]) -> None:
    assert fold(array, REPEATS) is None

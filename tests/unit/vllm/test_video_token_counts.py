"""The token rules of videos against vLLM: a video takes as many tokens as its rule allocates."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import video_token_rules
from server.errors import ImageAspectRatio, ImageTokenCap
from server.imaging.tokens.video import FLOOR, FrameTokens, MeasuredVideoTokens, QwenVideoTokens
from tests import families

MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in
       ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")},
    "qwen2_vl, fewer pixels": ("qwen2_vl", {"min_pixels": 15_680, "max_pixels": 70_560}),
    "qwen3_vl, fewer pixels": ("qwen3_vl", {"min_pixels": 9000, "max_pixels": 99_999}),
}  # fmt: skip
# Frames, width and height: few and many, odd numbers, tiny, elongated and large.
VIDEOS = [
    (1, 64, 48), (2, 3, 2), (2, 640, 480), (3, 97, 331), (4, 113, 111), (7, 320, 240),
    (8, 640, 360), (9, 1280, 40), (16, 200, 200),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def processor(model: str, checkpoints: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    family, options = MODELS[model]
    args = AsyncEngineArgs(
        model=str(families.build(family, checkpoints)),
        dtype="float32",
        max_model_len=4096,
        mm_processor_kwargs=dict(options),
    )
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


@functools.cache
def rule(model: str, checkpoints: Path) -> QwenVideoTokens | FrameTokens:
    found = video_token_rules.video_rule(processor(model, checkpoints), {})
    assert found is not None
    return found


@pytest.mark.parametrize("model", MODELS)
def test_allocated_tokens_of_a_video_equal_the_engines(model: str, checkpoints: Path) -> None:
    chosen, real = rule(model, checkpoints), processor(model, checkpoints)
    for frames, width, height in VIDEOS:
        natural = chosen.allocate(frames, width, height)
        fewest = chosen.fewest(frames, width, height)
        assert natural.options == {}
        assert natural.frames == max(frames, chosen.least_frames)
        with pytest.raises(ImageTokenCap):
            chosen.allocate(frames, width, height, fewest - 1)
        between = [fewest + (natural.tokens - fewest) * part // 5 for part in range(5)]
        for cap in (None, *sorted({*between, natural.tokens - 1, natural.tokens} - {fewest - 1})):
            got = chosen.allocate(frames, width, height, cap)
            assert cap is None or got.tokens <= cap
            size = got.resize or (width, height)
            counted = video_token_rules.count(real, got.frames, size, got.options)
            times = [float(time) for time in range(got.frames)]
            assert counted == (got.tokens, chosen.prompt_tokens(got, times)), (frames, size, cap)


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_frames_are_resized_before_the_processor_only_where_that_is_the_same(
    model: str, checkpoints: Path
) -> None:
    assert rule(model, checkpoints).alike


def test_a_cap_takes_pixels_down_to_the_floor_and_then_frames() -> None:
    chosen = QwenVideoTokens(28, 56 * 56, 28 * 28 * 1280)
    natural = chosen.allocate(16, 560, 280)
    assert (natural.tokens, natural.frames) == (8 * 200, 16)
    fewer_pixels = chosen.allocate(16, 560, 280, 8 * FLOOR)
    assert fewer_pixels.frames == 16
    assert fewer_pixels.tokens <= 8 * FLOOR
    fewer_frames = chosen.allocate(16, 560, 280, 8 * FLOOR - 1)
    assert fewer_frames.frames == 14
    tiny = chosen.allocate(16, 560, 280, 10)
    assert tiny.frames == 2
    assert tiny.tokens <= 10


def test_a_video_of_extreme_shape_is_refused() -> None:
    for together in (False, True):
        with pytest.raises(ImageAspectRatio):
            QwenVideoTokens(28, 1, 1 << 30, together=together).allocate(4, 28_000, 28)


def test_measured_tokens_keep_a_cap(checkpoints: Path) -> None:
    real = processor("qwen2_5_vl", checkpoints)
    measured = video_token_rules.measured_video_rule(real, {})
    assert isinstance(measured, MeasuredVideoTokens)
    exact = rule("qwen2_5_vl", checkpoints)
    natural = measured.allocate(6, 320, 240)
    assert natural.tokens == exact.allocate(6, 320, 240).tokens
    for cap in (natural.tokens - 1, 60, 4):
        got = measured.allocate(6, 320, 240, cap)
        counted = video_token_rules.count(real, got.frames, got.resize or (320, 240), {})
        assert counted.tokens == got.tokens <= cap
    with pytest.raises(ImageTokenCap):
        measured.allocate(6, 320, 240, 1)

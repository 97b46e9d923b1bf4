"""Features of videos, from the file to vLLM's item, against vLLM's loader and processor."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.transformers_utils.processor import get_video_processor_cls_name

from server.engine import video_extractor
from server.engine.extractor import ImageExtractor
from server.engine.launch import same_data
from server.engine.video_sampling import choose
from server.engine.video_token_rules import measured_video_rule, video_rule
from server.engine.vllm_adapter import processors, video_loaders
from server.engine.vllm_adapter.video_jobs import VideoJob, video_item, video_job
from server.errors import InvalidVideo, MediaProcessingFailed
from server.imaging.encoded import digest
from server.imaging.sampling import SamplingOptions
from server.imaging.video import header
from server.imaging.video.encoded import EncodedVideo
from server.ingest import video_features
from server.ingest.video_features import VideoFeaturesJob
from server.request.context import RequestContext
from server.telemetry.record import Record
from server.workers.protocol import ArraySpec
from server.workers.sandbox import Output
from server.workers.spare_time import SpareTime
from tests import encoded_videos, families

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
NO_SPARE_TIME = SpareTime(allowed=False)
FILE = encoded_videos.video("h264", "mp4", 60, (320, 200))

video_loaders.install()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model(family: str, folder: Path, **more: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs(
        model=str(families.build(family, folder)), dtype="float32", max_model_len=4096, **more
    )
    return args.create_model_config()


@functools.cache
def extractor(family: str, folder: Path, **more: Any) -> ImageExtractor:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(model(family, folder, **more))
    return ImageExtractor(processor, fast=True, max_pixels=1 << 24)


def processor(family: str, folder: Path) -> Any:
    return extractor(family, folder)._processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def media_io(family: str, folder: Path) -> VideoMediaIO:
    name = get_video_processor_cls_name(model(family, folder))
    loader = get_video_loader_backend_for_processor(name)
    return VideoMediaIO(ImageMediaIO(), **({"video_backend": loader} if loader else {}))


def job(
    family: str, folder: Path, cap: int | None = None, file: bytes = FILE, **asked: Any
) -> VideoJob:
    head = header.read(file)
    options = SamplingOptions(**asked)
    chosen = choose(head, media_io(family, folder), options)
    video = EncodedVideo(file, digest(file), head, chosen, options, "messages[0].content[0]")
    rule = video_rule(processor(family, folder), {})
    assert rule is not None
    allocation = rule.allocate(len(chosen.indices), *head.size, cap)
    context = RequestContext(Record())
    return video_job(context, video, allocation, {}, b"model", 1 << 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_placeholders_equal_vllms(family: str, folder: Path) -> None:
    assert_equal_to_vllm(job(family, folder), extractor(family, folder), media_io(family, folder))


@pytest.mark.parametrize(
    ("family", "method"), [("qwen2_5_vl", "evs"), ("qwen3_vl", "evs"), ("qwen3_vl", "vidcom2")]
)
def test_a_video_whose_tokens_are_pruned_equals_vllms(
    family: str, method: str, folder: Path
) -> None:
    pruning = extractor(family, folder, video_pruning_rate=0.5, video_pruning_method=method)
    assert video_rule(pruning._processor, {}) is None
    rule = measured_video_rule(pruning._processor, {})
    whole = job(family, folder)
    assert whole.allocation is not None
    allocation = rule.allocate(len(whole.chosen.indices), *whole.video.size)
    assert allocation.tokens < 0.75 * whole.allocation.tokens
    ours = video_job(whole.context, whole.video, allocation, {}, b"model", 1 << 24)
    tokens = assert_equal_to_vllm(ours, pruning, media_io(family, folder))
    assert tokens == allocation.tokens


def assert_equal_to_vllm(ours: VideoJob, extracting: ImageExtractor, io: VideoMediaIO) -> int:
    """The number of tokens of the video."""
    real = extracting._processor
    output = video_extractor._process(extracting, ours.work, NO_SPARE_TIME, FILE)
    features = video_features._features(output, ours.work.size)
    item, updates = video_item(real, features, ours)

    frames, metadata = io.load_bytes(FILE)
    metadata = {**metadata, "do_sample_frames": False}
    outputs, _ = processors.video_processed(real, frames, metadata, {})
    theirs, their_updates = processors.video_item(real, outputs, frames, metadata, {})
    assert item.keys() == theirs.keys()
    for name in theirs:
        assert same_data(item[name].data, theirs[name].data), name
    assert updates[0].content.full == their_updates[0].content.full
    assert updates[0].target == their_updates[0].target
    return tokens_of(updates)


def tokens_of(updates: processors.Updates) -> int:
    content = updates[0].content
    if content.is_embed is None:
        return len(content.full)
    return int(content.is_embed(content.full).sum())


def seconds(family: str, folder: Path, work: VideoJob) -> list[float]:
    """The times that the processor writes into the prompt."""
    output = video_extractor._process(
        extractor(family, folder), work.work, NO_SPARE_TIME, work.video.data
    )
    features = video_features._features(output, work.work.size)
    _, updates = video_item(processor(family, folder), features, work)
    text = processor(family, folder).info.get_tokenizer().decode(updates[0].content.full)
    return [float(found) for found in re.findall(r"<([0-9.]+) seconds>", text)]


def test_the_prompt_has_the_true_times_of_a_variable_rate(folder: Path) -> None:
    """Two seconds at 20 frames a second, and four at 2."""
    times = [*(index / 20 for index in range(40)), *(2 + index / 2 for index in range(8))]
    file = encoded_videos.encode(encoded_videos.scene(48), times=times)
    work = job("qwen3_vl", folder, file=file, num_frames=12)
    shown = work.video.times(work.chosen.indices)
    assert shown == pytest.approx([times[index] for index in work.chosen.indices])
    middles = [(first + second) / 2 for first, second in zip(shown[::2], shown[1::2], strict=True)]
    assert seconds("qwen3_vl", folder, work) == pytest.approx(middles, abs=0.051)
    by_mean_rate = [index * 6 / 48 for index in work.chosen.indices]
    assert np.abs(np.array(shown) - by_mean_rate).max() > 1


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_constant_rate_is_told_as_by_vllm(folder: Path, codec: str) -> None:
    """Matroska rounds times to milliseconds."""
    container = "mp4" if codec == "h264" else "matroska"
    times = [index * 1001 / 30_000 for index in range(90)]
    file = encoded_videos.encode(encoded_videos.scene(90), codec, container, times=times)
    work = job("qwen3_vl", folder, file=file)
    assert work.chosen.metadata["frames_indices"] == list(work.chosen.indices)
    assert work.chosen.metadata["fps"] == pytest.approx(29.97, abs=0.1)


def test_features_of_another_size_than_planned_are_refused(folder: Path) -> None:
    work = job("qwen3_vl", folder)
    output = video_extractor._process(extractor("qwen3_vl", folder), work.work, NO_SPARE_TIME, FILE)
    features = video_features._features(output, work.work.size)
    grid = features.arrays(processors.tensor)["video_grid_thw"]  # over the shared memory
    pairs, rows, columns = grid[0].tolist()
    for other in ([pairs, columns, rows * 2], [-pairs, -rows, columns], [1 << 40, rows, columns]):
        grid[0] = torch.tensor(other)
        with pytest.raises(MediaProcessingFailed):
            video_item(processor("qwen3_vl", folder), features, work)
    grid[0] = torch.tensor([pairs, rows, columns])
    del features.specs["video_grid_thw"]
    with pytest.raises(MediaProcessingFailed):
        video_item(processor("qwen3_vl", folder), features, work)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_under_a_cap_has_the_tokens_of_its_plan(family: str, folder: Path) -> None:
    for cap in (33, 70, 300):
        ours = job(family, folder, cap, num_frames=9)
        assert ours.allocation is not None
        assert ours.allocation.tokens <= cap
        output = video_extractor._process(extractor(family, folder), ours.work, NO_SPARE_TIME, FILE)
        features = video_features._features(output, ours.work.size)
        _, updates = video_item(processor(family, folder), features, ours)
        assert tokens_of(updates) == ours.allocation.tokens


def test_the_key_depends_on_frames_size_options_and_group(folder: Path) -> None:
    same = job("qwen3_vl", folder)
    assert same.key == job("qwen3_vl", folder).key
    others = [
        job("qwen3_vl", folder, num_frames=3),
        job("qwen3_vl", folder, start_s=1.0),
        job("qwen3_vl", folder, 100),
    ]
    assert len({same.key, *(other.key for other in others)}) == 4


def test_a_damaged_file_and_a_wrong_size_are_refused(folder: Path) -> None:
    work = job("qwen3_vl", folder).work
    other_size = msgspec.structs.replace(work, size=(64, 48))
    with pytest.raises(InvalidVideo, match="size in its header"):
        video_extractor._process(extractor("qwen3_vl", folder), other_size, NO_SPARE_TIME, FILE)
    table = FILE.index(b"moov") - 4
    blank = FILE[:64] + bytes(table - 64) + FILE[table:]
    with pytest.raises(InvalidVideo):
        video_extractor._process(extractor("qwen3_vl", folder), work, NO_SPARE_TIME, blank)


def test_options_are_tried_within_bounded_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child process imports what they need before its own limits hold."""

    def take_much(self: ImageExtractor, kwargs: Any) -> None:
        np.empty(3 << 30, np.uint8)

    monkeypatch.setattr(ImageExtractor, "warm_up_videos", take_much)
    loaded = (None, extractor("qwen3_vl", folder))
    monkeypatch.setattr(video_extractor.preload, "loaded", lambda: loaded)
    with pytest.raises(MemoryError):
        video_extractor.prepare(msgspec.msgpack.encode(job("qwen3_vl", folder).work), NO_SPARE_TIME)
    take_much(loaded[1], {})  # and no longer


def test_a_large_frame_that_is_damaged_is_replaced() -> None:
    """All frames are decoded in one pass, however large they are."""
    size = (3072, 2048)
    data = bytearray(encoded_videos.encode(encoded_videos.scene(4, size), "vp8", "webm"))
    samples = header.read_track(bytes(data)).samples
    start, length = int(samples.offsets[3]), int(samples.sizes[3])
    data[start + 1 : start + length] = b"\xff" * (length - 1)
    small = VideoFeaturesJob((0, 1, 2, 3), size, (96, 64), {}, b"", 1 << 24)
    frames = video_extractor._decoded(small, bytes(data), NO_SPARE_TIME)
    assert frames.shape == (4, 64, 96, 3)
    assert (frames[3] == frames[2]).all()


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        ("uint8", (9,), 0),
        ("uint8", (2,), 7),
        ("uint8", (-1,), 0),
        ("uint8", (4,), -1),
        ("float32", (3,), 0),
        ("no type", (1,), 0),
    ],
)
def test_arrays_outside_of_the_memory_are_refused(
    dtype: str, shape: tuple[int, ...], offset: int
) -> None:
    specs: Any = {"pixel_values": ArraySpec(dtype, shape, offset)}
    answer = video_features.VideoFeaturesAnswer(specs, 0.0, 0.0)
    data: Any = torch.zeros(8, dtype=torch.uint8).numpy()
    with pytest.raises(MediaProcessingFailed):
        video_features._features(Output(msgspec.msgpack.encode(answer), [data]), (8, 8))

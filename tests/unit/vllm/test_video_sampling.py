"""The frames that are chosen from a header, against those that vLLM's loaders decode."""

from dataclasses import replace
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pytest
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from server.engine.video_sampling import choose
from server.engine.vllm_adapter import video_loaders
from server.engine.vllm_adapter.video_loaders import LoaderUnsupported
from server.errors import ClientError
from server.imaging.sampling import ChosenFrames, SamplingOptions
from server.imaging.video.header import VideoHeader
from tests import clips

video_loaders.install()

# Those that decode on a CPU.
LOADERS = [
    name
    for name in VIDEO_LOADER_REGISTRY.name2class
    if not VIDEO_LOADER_REGISTRY.backend_requires_gpu(name)
]
# Frames and frames per second.
CLIPS = [(2, 1.0), (7, 1.0), (8, 4.0), (61, 30_000 / 1001), (100, 25.0), (450, 30.0)]
ASKED = SamplingOptions()


def loader(name: str, **options: Any) -> VideoMediaIO:
    return VideoMediaIO(ImageMediaIO(), video_backend=name, **options)


def header(frames: int, fps: float) -> VideoHeader:
    return VideoHeader("mp4", "h264", (64, 48), 0, np.arange(frames) / fps, frames / fps)


def decoded(io: VideoMediaIO, file: bytes) -> tuple[int, dict[str, Any]] | None:
    """How many frames vLLM's loader decodes, and its metadata; None if it refuses the file."""
    try:
        frames, metadata = io.load_bytes(file)
    except (ValueError, ZeroDivisionError, RuntimeError):
        return None
    return len(frames), metadata


@pytest.mark.parametrize("options", [{}, {"fps": 3}, {"num_frames": 5}, {"max_frames": 6}])
@pytest.mark.parametrize("name", [name for name in LOADERS if name != "nemotron_vl"])
def test_the_chosen_frames_and_their_metadata_equal_vllms(
    name: str, options: dict[str, Any]
) -> None:
    io = loader(name, **options)
    compared = 0
    for frames, fps in CLIPS:
        file = clips.video(codec="mp4v", frames=frames, fps=fps)
        capture = cv2.VideoCapture(BytesIO(file), cv2.CAP_FFMPEG, [])  # type: ignore[call-overload]
        rate = capture.get(cv2.CAP_PROP_FPS)
        theirs = decoded(io, file)
        if theirs is None:
            with pytest.raises(ClientError):
                choose(header(frames, rate), io, ASKED)
            continue
        ours = choose(header(frames, rate), io, ASKED)
        assert len(ours.indices) == theirs[0]
        if name != "glmga":  # repeats the last frame, and does not tell
            assert list(ours.indices) == theirs[1]["frames_indices"]
        assert ours.metadata == theirs[1] | {"do_sample_frames": False}
        compared += 1
    assert compared


def test_a_loader_that_needs_the_file_is_not_run_without_it() -> None:
    with pytest.raises(LoaderUnsupported):
        choose(header(8, 4), loader("nemotron_vl"), ASKED)


def chosen(frames: int, rate: float, name: str = "qwen3_vl", **asked: Any) -> ChosenFrames:
    return choose(header(frames, rate), loader(name), SamplingOptions(**asked))


def test_a_rate_at_which_a_loader_would_step_through_millions_of_moments_is_refused() -> None:
    long, options = header(7200, 2.0), {"fps": 10_000, "max_duration": 10_000}
    with pytest.raises(ClientError, match="fps asks for more than 1048576 moments"):
        choose(long, loader("opencv_dynamic", **options), ASKED)
    assert choose(long, loader("opencv_dynamic", fps=200, max_duration=10_000), ASKED).indices


def test_a_request_sets_the_rate_of_the_models_rule() -> None:
    assert chosen(80, 8).indices == chosen(80, 8, fps=2.0).indices
    assert len(chosen(80, 8, fps=4.0).indices) == 40
    assert len(chosen(80, 8, "opencv", fps=0.5).indices) == 5


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "opencv", "opencv_dynamic", "glm46v"])
def test_a_request_sets_the_number_of_frames(name: str) -> None:
    for count in (1, 2, 5, 80):
        found = chosen(80, 8, name, num_frames=count)
        assert len(found.indices) == count
        assert found.indices[0] == 0
        assert found.indices[-1] == (79 if count > 1 else 0)
        assert found.metadata["frames_indices"] == list(found.indices)
    assert chosen(80, 8, name, num_frames=99).indices == tuple(range(80))


def test_a_request_thins_out_the_frames_of_the_models_rule() -> None:
    whole = chosen(80, 8)
    assert chosen(80, 8, max_frames=99) == whole
    few = chosen(80, 8, max_frames=3)
    assert few.indices == (whole.indices[0], whole.indices[10], whole.indices[19])
    assert few == whole.limited(1, 3)


def test_a_part_of_a_video_is_sampled_as_a_video_and_keeps_its_times() -> None:
    part = chosen(80, 8, start_s=2.0, end_s=6.0)
    alone = chosen(32, 8)
    assert part.indices == tuple(16 + index for index in alone.indices)
    assert part.metadata == chosen(80, 8).metadata | {"frames_indices": list(part.indices)}
    assert chosen(80, 8, start_s=9.8).indices == (79,)
    for outside in ({"start_s": 10.0}, {"start_s": 5.01, "end_s": 5.02}):
        with pytest.raises(ClientError, match="no frame between"):
            chosen(80, 8, **outside)


def test_frames_of_a_variable_rate_are_found_by_their_times() -> None:
    times = np.array([0, 0.1, 0.2, 5.0, 5.1, 9.0])
    varied = replace(header(6, 1), times=times, duration_s=9.1)
    found = choose(varied, loader("opencv"), SamplingOptions(start_s=0.15, end_s=5.05))
    assert found.indices == (2, 3)

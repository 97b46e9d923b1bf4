"""Runs vLLM's loaders of videos without a video: they choose frames and describe them.

A loader applies the rule of its family in the middle of decoding. Here it runs as it is, with a
decoder that returns the numbers of frames in the place of their pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.multimodal import video as vllm_video
from vllm.multimodal.media import VideoMediaIO
from vllm.multimodal.video_decoders import VideoSourceMetadata

_module: Any = vllm_video
_decode_video = _module.decode_video


class LoaderUnsupported(Exception):
    """A loader that does more than choose frames and describe them, so that it must decode."""


@dataclass(frozen=True)
class _HeaderOnly:
    """Stands for a file of which only the header is known."""

    source: VideoSourceMetadata


def install() -> None:
    """Let loaders run without a video."""
    _module.decode_video = _decode


def loaded(
    loader: Any, source: VideoSourceMetadata, num_frames: int, options: Mapping[str, Any]
) -> tuple[list[int], dict[str, Any]]:
    """The numbers of the frames that `loader` takes of a video, and what it tells of them. A number
    may occur twice.

    Raises:
        LoaderUnsupported
        Exception: it refuses the video or the options.
    """
    data: Any = _HeaderOnly(source)
    try:
        frames, metadata = loader.load_bytes(data, num_frames=num_frames, **options)
    except TypeError as error:  # it reads the file itself
        raise LoaderUnsupported from error
    if any(value is data for value in metadata.values()):
        raise LoaderUnsupported
    return frames.reshape(-1).tolist(), metadata


class _NoPixels:
    """In the place of vLLM's reader of images."""

    def load_base64(self, media_type: str, data: str) -> Any:
        return np.zeros((1, 1, 3), np.uint8)


def series(count: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM tells of a video that is sent as `count` pictures under `options`
    (`media_io_kwargs.video`). The first `num_frames` are shown, if that is given.

    Raises:
        Exception: it refuses the options.
    """
    images: Any = _NoPixels()
    io = VideoMediaIO(images, **{"num_frames": -1, **options})
    found = io.load_base64("video/jpeg", ",".join(["0"] * count))
    told: dict[str, Any] = found.media[1]
    return told


def _decode(
    backend: str,
    loader: Any,
    data: Any,
    target: Any,
    sampling: dict[str, Any],
    options: dict[str, Any],
    *,
    frame_recovery: bool,
) -> Any:
    """vLLM's function but for a `_HeaderOnly`, for which the frames are their numbers."""
    if not isinstance(data, _HeaderOnly):
        return _decode_video(
            backend, loader, data, target, sampling, options, frame_recovery=frame_recovery
        )
    source = loader._prepare_source(data.source)
    wanted = loader.compute_frames_index_to_sample(source=source, target=target, **sampling)
    # vLLM's decoder with OpenCV returns a frame once.
    numbers = sorted(set(wanted)) if backend == "opencv" else list(wanted)
    return np.array(numbers, np.int64).reshape(-1, 1, 1, 1), source, numbers, numbers

"""Lets vLLM's loaders of videos choose frames that this project's decoder decodes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.multimodal import video as vllm_video
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

from server.imaging.video import header as headers
from server.imaging.video.limits import VideoLimits
from server.imaging.video.track import MAX_FRAMES


def install(decode: Callable[..., npt.NDArray[np.uint8]], max_pixels: int) -> None:
    """Let all loaders decode with `decode`, which is `imaging.video.frames.decode`; a frame has at
    most `max_pixels`."""
    module: Any = vllm_video
    module.decode_video = functools.partial(_decode, decode, max_pixels)


def _decode(
    decode: Callable[..., npt.NDArray[np.uint8]],
    max_pixels: int,
    backend: str,
    loader: Any,
    data: bytes,
    target: VideoTargetMetadata,
    sampling: dict[str, Any],
    _options: dict[str, Any],
    *,
    frame_recovery: bool,  # frames that are damaged are always replaced
) -> tuple[npt.NDArray[np.uint8], VideoSourceMetadata, list[int], list[int]]:
    """vLLM's `decode_video`, for all of its backends: the frames, what is told of the video, the
    numbers of the frames that were wanted, and of those returned."""
    header = headers.read(data)
    VideoLimits(max_pixels, math.inf, MAX_FRAMES).check(header)
    count, fps = header.frame_count, header.fps
    source = loader._prepare_source(VideoSourceMetadata(count, fps, count / fps if fps else 0))
    wanted = list(loader.compute_frames_index_to_sample(source=source, target=target, **sampling))
    # vLLM's decoder with OpenCV returns a frame once.
    numbers = sorted(set(wanted)) if backend == "opencv" else wanted
    return decode(data, numbers, None, max_pixels), source, wanted, numbers

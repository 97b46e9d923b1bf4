"""One video of a request: the work of its child process, and vLLM's item of the result."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from blake3 import blake3

from server.engine.vllm_adapter import processors
from server.engine.vllm_adapter.processor_cache import PooledItem
from server.engine.vllm_adapter.processors import Processor, Updates
from server.errors import ClientError, MediaProcessingFailed
from server.imaging.sampling import ChosenFrames
from server.imaging.tokens.video import VideoAllocation
from server.imaging.video.encoded import EncodedVideo
from server.ingest.video_features import VideoFeaturesJob
from server.request.context import RequestContext, ShownVideo
from server.request.groups import prefixed
from server.workers.jobs import encode_kwargs
from server.workers.protocol import Features

log = logging.getLogger("saccade.engine")

_WHITE = (255, 255, 255)
# What torch and vLLM raise on features that do not fit each other.
_UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class VideoJob(msgspec.Struct, frozen=True):
    """One video of a request: its frames and tokens, the work of the child process, the key of its
    features, and the keyword arguments of the model's processor."""

    context: RequestContext
    video: EncodedVideo
    allocation: VideoAllocation | None
    chosen: ChosenFrames
    key: str
    work: VideoFeaturesJob
    kwargs: Mapping[str, Any]

    @property
    def most_bytes(self) -> int:
        """About how much memory the features take at most: three channels of 32 bits."""
        width, height = self.allocation.processed if self.allocation else self.video.size
        return 12 * width * height * len(self.chosen.indices)

    def shown(self, tokens: int, *, cached: bool) -> ShownVideo:
        """What the prompt holds of the video."""
        return ShownVideo(
            size=self.video.size,
            frames=self.chosen.indices,
            times=self.video.times(self.chosen.indices),
            tokens=tokens,
            processed=self.allocation.processed if self.allocation else None,
            cached=cached,
        )


def video_job(
    context: RequestContext,
    video: EncodedVideo,
    allocation: VideoAllocation | None,
    kwargs: Mapping[str, Any],
    fingerprint: bytes,
    max_pixels: int,
    background: tuple[int, int, int] = _WHITE,
) -> VideoJob:
    """What a child process has to do for `video`. Its key is the hash of the file's bytes, of what
    is done with them, and of the model, prefixed with the group of the request."""
    chosen, kwargs = video.chosen, {**kwargs, **(allocation.options if allocation else {})}
    if allocation is not None:
        chosen = chosen.limited(allocation.frames, allocation.frames)
    try:
        encoded = encode_kwargs(kwargs)
    except ClientError as error:
        error.param = video.path
        raise
    form = video.header.form
    is_container = form not in ("animation", "pictures")
    work = VideoFeaturesJob(
        indices=chosen.indices,
        size=video.size,
        resize=allocation.resize if allocation else None,
        metadata=chosen.metadata,
        kwargs=encoded,
        max_pixels=max_pixels,
        form=form,
        background=_WHITE if is_container else background,
    )
    hasher = blake3(fingerprint)
    hasher.update(b"video")
    hasher.update(msgspec.msgpack.encode(work))
    hasher.update(video.digest.encode())
    key = prefixed(hasher.hexdigest(), context.group)
    return VideoJob(context, video, allocation, chosen, key, work, kwargs)


def video_item(
    processor: Processor, features: Features, job: VideoJob
) -> tuple[PooledItem, Updates]:
    """vLLM's item over the shared memory of `features`, and what it puts into the prompt.

    Raises:
        MediaProcessingFailed: the features, which may come from a hijacked process, are not those
            of such a video.
    """
    size = job.work.resize or job.video.size
    blank = processors.blank_frames(len(job.chosen.indices), size)
    try:
        outputs = features.arrays(processors.tensor)
        _check_grid(outputs, job.allocation)
        item, updates = processors.video_item(
            processor, outputs, blank, job.chosen.metadata, job.kwargs
        )
    except _UNFIT as error:
        log.error("a video has unexpected features: %r", error)
        raise MediaProcessingFailed(
            "the video could not be processed", param=job.video.path
        ) from None
    return PooledItem(item), updates


def _check_grid(outputs: Mapping[str, Any], allocation: VideoAllocation | None) -> None:
    """Raises ValueError if the features have another grid than planned: the placeholders in the
    prompt follow from it."""
    if allocation is None or allocation.grid is None:
        return
    grid, patches = outputs["video_grid_thw"].tolist(), outputs["pixel_values_videos"]
    if grid != [list(allocation.grid)] or len(patches) != math.prod(allocation.grid):
        raise ValueError(f"{grid} and {len(patches)} patches instead of {allocation.grid}")

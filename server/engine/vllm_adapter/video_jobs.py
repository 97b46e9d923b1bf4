"""One video of a request: the work of its child process, and vLLM's item of the result."""

from collections.abc import Mapping
from typing import Any

import msgspec
from blake3 import blake3

from server.engine.vllm_adapter import processors
from server.engine.vllm_adapter.processor_cache import PooledItem
from server.engine.vllm_adapter.processors import Processor, Updates
from server.errors import ClientError
from server.imaging.sampling import ChosenFrames
from server.imaging.tokens.video import VideoAllocation
from server.imaging.video.encoded import EncodedVideo
from server.ingest.video_features import VideoFeaturesJob
from server.request.context import RequestContext, ShownVideo
from server.request.groups import prefixed
from server.workers.jobs import encode_kwargs
from server.workers.protocol import Features


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
    work = VideoFeaturesJob(
        indices=chosen.indices,
        size=video.size,
        resize=allocation.resize if allocation else None,
        metadata=chosen.metadata,
        kwargs=encoded,
        max_pixels=max_pixels,
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
    """vLLM's item over the shared memory of `features`, and what it puts into the prompt."""
    outputs = features.arrays(processors.tensor)
    size = job.work.resize or job.video.size
    blank = processors.blank_frames(len(job.chosen.indices), size)
    item, updates = processors.video_item(
        processor, outputs, blank, job.chosen.metadata, job.kwargs
    )
    return PooledItem(item), updates

"""Which frames of a video the model gets, from the numbers in its header alone.

Each family has a rule: two frames per second, thirty-two frames, frames at whole seconds. vLLM's
loaders have these rules; a part of a request may ask for less.
"""

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_decoders import VideoSourceMetadata

from server.engine.vllm_adapter.video_loaders import loaded
from server.errors import ClientError, InvalidVideo, SaccadeError
from server.imaging.encoded import digest
from server.imaging.sampling import ChosenFrames, SamplingOptions, span, spread
from server.imaging.video.encoded import EncodedVideo
from server.imaging.video.header import VideoHeader
from server.request.media import MediaRef

logger = init_logger(__name__)

# What vLLM's loaders raise for videos and options that they do not take.
_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError)


def encoded_video(ref: MediaRef, io: VideoMediaIO) -> EncodedVideo:
    """The video of `ref` with the frames that the loader of `io` takes of it. The time grows with
    the size of the file and the number of its frames.

    Raises: as `choose` does; `param` is the path of the part.
    """
    assert ref.video is not None
    try:
        chosen = choose(ref.video, io, ref.sampling)
    except SaccadeError as error:
        error.param = error.param or ref.path
        raise
    return EncodedVideo(ref.data, digest(ref.data), ref.video, chosen, ref.sampling, ref.path)


def choose(header: VideoHeader, io: VideoMediaIO, asked: SamplingOptions) -> ChosenFrames:
    """The frames that the loader of `io`, with its options, takes of a video with `header`, as far
    as the request asks for them.

    Raises:
        ClientError: no frame is shown between `start` and `end`, or the loader refuses the options.
        InvalidVideo: the loader takes no frame.
        LoaderUnsupported
    """
    first, last = span(header.times, asked.start_s, asked.end_s)
    if last <= first:
        raise ClientError("the video has no frame between start and end")
    num_frames, options = _options(io, asked)
    try:
        found, told = loaded(io.video_loader, _source(header, last - first), num_frames, options)
    except _REFUSALS as error:
        logger.debug("the loader refused a video", exc_info=error)
        raise ClientError("the video cannot be sampled with these options") from None
    numbers = found
    if asked.num_frames is not None:
        numbers = spread(range(last - first), asked.num_frames)
    elif asked.max_frames is not None:
        numbers = spread(found, asked.max_frames)
    if not numbers:
        raise InvalidVideo("the model takes no frame of this video")
    if numbers is not found:
        told["frames_indices"] = numbers
    if last - first < header.frame_count:
        told["frames_indices"] = [first + number for number in told["frames_indices"]]
        whole = _source(header, header.frame_count)
        told |= {"total_num_frames": whole.total_frames_num, "duration": whole.duration}
    told["do_sample_frames"] = False
    return ChosenFrames(tuple(first + number for number in numbers), told)


def _options(io: VideoMediaIO, asked: SamplingOptions) -> tuple[int, Mapping[str, Any]]:
    """`num_frames` and the other options of the loader."""
    if asked.fps is None:
        return io.num_frames, io.kwargs
    rate = int(asked.fps) if asked.fps.is_integer() else asked.fps
    return -1, {**io.kwargs, "fps": rate, "sampling_fps": rate}


def _source(header: VideoHeader, frames: int) -> VideoSourceMetadata:
    """What vLLM's decoder would tell of `frames` frames of the video."""
    fps = header.fps
    return VideoSourceMetadata(frames, fps, frames / fps if fps > 0 else 0)

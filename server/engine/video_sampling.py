"""Which frames of a video the model gets, from the numbers in its header alone.

Each family has a rule: two frames per second, thirty-two frames, frames at whole seconds. vLLM's
loaders have these rules; a part of a request may ask for less.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.multimodal.media import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.multimodal.video_decoders import VideoSourceMetadata

from server.engine.vllm_adapter.video_loaders import LoaderUnsupported, loaded, series
from server.errors import ClientError, InvalidVideo, SaccadeError
from server.imaging.sampling import ChosenFrames, SamplingOptions, span, spread
from server.imaging.video.encoded import EncodedVideo
from server.imaging.video.header import VideoHeader
from server.request.media import MediaRef

logger = init_logger(__name__)

# What vLLM's loaders raise for videos and options that they do not take.
_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError)
# Moments at which a loader looks for a frame. Some step through all of them, in Python.
_MOST_MOMENTS = 1 << 20
# A processor computes times as if all frames took equally long. If one is then off by more than
# this, in seconds, it is told numbers of thousandths of a second in the place of frames.
_MOST_OFF_S = 0.01
_TICKS_PER_S = 1000


def encoded_video(
    ref: MediaRef, options: Mapping[str, Any], video_processor: str | None, most: int
) -> EncodedVideo:
    """The video of `ref` with the frames that the model's loader takes of it, or the loader that
    `options` (`media_io_kwargs.video`) name. `most`: frames that a video may show. The time grows
    with the number of frames of the file.

    Raises: as `choose` does; `param` is the path of the part.
    """
    header = ref.video
    assert header is not None
    try:
        if header.form == "pictures":
            header, chosen = choose_pictures(header, options, video_processor, ref.sampling)
        else:
            chosen = choose(header, loader_io(options, video_processor), ref.sampling)
        if len(chosen.indices) > most:
            raise ClientError(
                f"{len(chosen.indices)} frames of the video would be shown, the limit is {most}"
            )
    except SaccadeError as error:
        error.param = error.param or ref.path
        raise
    return EncodedVideo(ref.data, ref.digest, header, chosen, ref.sampling, ref.path)


def loader_io(options: Mapping[str, Any], video_processor: str | None) -> VideoMediaIO:
    """vLLM's reader of videos under `options`, for the model's class of processors of videos."""
    given = dict(options)
    loader = get_video_loader_backend_for_processor(video_processor)
    if "video_backend" not in given and loader:
        given["video_backend"] = loader
    return VideoMediaIO(ImageMediaIO(), **given)


def choose_pictures(
    header: VideoHeader,
    options: Mapping[str, Any],
    video_processor: str | None,
    asked: SamplingOptions,
) -> tuple[VideoHeader, ChosenFrames]:
    """The frames of a video that is sent as pictures: all of them, as far as `options` and the
    request ask for them; and the header with their times, by the rate that either one tells.

    Raises:
        ClientError: no frame is shown between `start` and `end`, or the options are refused.
        LoaderUnsupported: the other videos of the request would be left to vLLM.
    """
    rate = asked.fps or options.get("fps") or 0
    given = {**options, "fps": rate if rate > 0 else 1}
    try:
        told = series(header.frame_count, given)
        if sorted(told["frames_indices"]) != told["frames_indices"]:
            raise ValueError
    except _REFUSALS as error:
        logger.debug("vLLM refused a video of pictures", exc_info=error)
        raise ClientError("the pictures do not fit the options for videos") from None
    _check_loader(loader_io(options, video_processor))
    times = np.array(told["frames_indices"], np.float64) / told["fps"]
    first, last = span(times, asked.start_s, asked.end_s)
    numbers = spread(range(first, last), asked.num_frames or asked.max_frames or last)
    if not numbers:
        raise ClientError("the video has no frame between start and end")
    told["frames_indices"] = [told["frames_indices"][number] for number in numbers]
    told["do_sample_frames"] = False
    timed = replace(header, times=times, duration_s=float(told["duration"]))
    return timed, ChosenFrames(tuple(numbers), told)


def _check_loader(io: VideoMediaIO) -> None:
    """Raises LoaderUnsupported."""
    try:
        loaded(io.video_loader, VideoSourceMetadata(8, 2.0, 4.0), io.num_frames, io.kwargs)
    except LoaderUnsupported:
        raise
    except _REFUSALS:
        return


def choose(header: VideoHeader, io: VideoMediaIO, asked: SamplingOptions) -> ChosenFrames:
    """The frames that the loader of `io`, with its options, takes of a video with `header`, as far
    as the request asks for them.

    Raises:
        ClientError: no frame is shown between `start` and `end`, the loader refuses the options, or
            it would look for far more frames than there are.
        InvalidVideo: the loader takes no frame.
        LoaderUnsupported
    """
    first, last = span(header.times, asked.start_s, asked.end_s)
    if last <= first:
        raise ClientError("the video has no frame between start and end")
    num_frames, options = _options(io, asked)
    source = _source(header, last - first)
    if (options.get("fps") or 0) * source.duration > _MOST_MOMENTS:
        raise ClientError(
            f"fps asks for more than {_MOST_MOMENTS} moments of the video, which is the limit"
        )
    try:
        found, told = loaded(io.video_loader, source, num_frames, options)
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
    if not _is_even(header):
        told |= _ticks(header, told["frames_indices"])
    return ChosenFrames(tuple(first + number for number in numbers), told)


def _is_even(header: VideoHeader) -> bool:
    """Whether frames are shown at a constant rate."""
    fps = header.fps
    if fps == 0:
        return True
    off = np.abs(np.arange(header.frame_count) / fps - header.times)
    return bool(off.max() <= _MOST_OFF_S)


def _ticks(header: VideoHeader, shown: list[int]) -> dict[str, Any]:
    """What tells a processor when the frames `shown` are, at a variable rate: it divides their
    numbers by the rate, so it gets both in thousandths of a second."""
    times = header.times[np.asarray(shown, np.int64)]
    return {
        "frames_indices": np.rint(times * _TICKS_PER_S).astype(int).tolist(),
        "fps": float(_TICKS_PER_S),
        "total_num_frames": max(1, round(header.duration_s * _TICKS_PER_S)),
        "duration": header.duration_s,
    }


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

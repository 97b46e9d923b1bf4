"""Decodes videos and audio clips in a child process. vLLM's loaders choose the frames.

`video_options`, which reads how vLLM would decode a video, runs in the server; `prepare` in the
child.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import cv2
import msgspec
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

from server.engine.vllm_adapter import video_decoder
from server.errors import (
    ClientError,
    InvalidAudio,
    InvalidVideo,
    VideoTooLarge,
    ran_out,
)
from server.imaging.containers import AudioContainer, refuse_references
from server.imaging.decode import DecodeOptions, warm_up
from server.imaging.decode import decode as decode_picture
from server.imaging.video import pictures
from server.ingest.video import (
    AudioAnswer,
    AudioJob,
    PicturesJob,
    VideoAnswer,
    VideoJob,
    VideoOptions,
)
from server.workers.sandbox import Data, Output
from server.workers.spare_time import SpareTime

logger = init_logger(__name__)

PREPARE = "server.engine.clips:prepare"

# FFmpeg's names of the containers of audio clips.
_DEMUXERS: dict[AudioContainer, str] = {
    "wav": "wav",
    "flac": "flac",
    "ogg": "ogg",
    "mp3": "mp3",
    "mp4": "mov",
    "matroska": "matroska",
}
_MAX_COUNT = 1 << 16
_GPU_OPTIONS = ("backend", "device", "hw_decoders", "pool_size", "timeout_sec")


# ---------------------------------------------------------------------- options, in the server


def _positive_or_unset(value: float) -> float:
    if value != -1 and value <= 0:
        raise ValueError
    return value


_Unset = AfterValidator(_positive_or_unset)
_Count = Annotated[int, Field(ge=1, le=_MAX_COUNT, description="a positive integer")] | None
_AnyCount = Annotated[int, Field(le=_MAX_COUNT, description="a positive integer, or -1"), _Unset]
_Rate = Annotated[
    float, Field(le=1e4, allow_inf_nan=False, description="a positive number, or -1"), _Unset
]
_Index = Annotated[int, Field(ge=0)]


class _Options(BaseModel):
    """Types and ranges of the options of vLLM's loaders. Options that are not given are left to the
    loader. A loader may have further options, whose values may be any JSON."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, JsonValue]

    num_frames: _AnyCount = -1
    fps: _Rate = -1
    max_duration: _Rate = -1
    min_frames: _Count = None
    max_frames: _Count = None
    max_fps: _Count = None
    sampling_fps: _Count = None
    frame_recovery: Annotated[bool, Field(description="a boolean")] = False
    do_sample_frames: Annotated[bool, Field(description="a boolean")] = False
    backend: Annotated[
        Literal["opencv", "torchcodec"], Field(description="'opencv' or 'torchcodec'")
    ] = "opencv"
    device: Annotated[Literal["cpu"], Field(description="'cpu'")] = "cpu"
    seek_mode: Annotated[
        Literal["exact", "approximate"], Field(description="'exact' or 'approximate'")
    ] = "exact"
    num_ffmpeg_threads: Annotated[
        int, Field(ge=0, le=64, description="an integer from 0 to 64")
    ] = 0
    frames_indices: Annotated[
        list[_Index] | None, Field(max_length=_MAX_COUNT, description="a list of frame numbers")
    ] = None
    total_num_frames: _Count = None
    duration: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="a number of at least 0")
    ] = None


def check_options(options: Mapping[str, Any], max_frames: int) -> None:
    """Check `media_io_kwargs.video` against the options of vLLM's loaders. `max_frames`: how many
    frames a video may show.

    Raises:
        ClientError: a value has the wrong type or is out of range; `param` names it.
    """
    try:
        _Options.model_validate(dict(options))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        field = _Options.model_fields.get(name)
        path = f"media_io_kwargs.video.{name}"
        raise ClientError(
            f"{path} must be {field.description if field else 'a JSON value'}", param=path
        ) from None
    for name in ("num_frames", "max_frames"):
        if (options.get(name) or 0) > max_frames:
            path = f"media_io_kwargs.video.{name}"
            raise ClientError(f"{path} must be at most {max_frames}", param=path)
    loader = options.get("video_backend")
    if loader is not None and loader not in VIDEO_LOADER_REGISTRY.name2class:
        path = "media_io_kwargs.video.video_backend"
        raise ClientError(f"{path} must be the name of a video loader", param=path)


def video_options(io: VideoMediaIO) -> VideoOptions:
    """The options with which `io` would decode a video."""
    loader = type(io.video_loader)
    return VideoOptions(
        loader=f"{loader.__module__}:{loader.__qualname__}",
        num_frames=io.num_frames,
        options=io.kwargs,
        image=io.image_io.kwargs | {"image_mode": io.image_io.image_mode},
    )


def use_cpu_decoders(config: VllmConfig) -> None:
    """Remove video decoders that need a GPU from the engine's configuration: videos are decoded in
    separate processes, which have no GPU."""
    multimodal = config.model_config.multimodal_config
    options = multimodal.media_io_kwargs.get("video", {}) if multimodal is not None else {}
    names = (options.get("video_backend"), options.get("backend"))
    on_gpu = [name for name in names if name and VIDEO_LOADER_REGISTRY.backend_requires_gpu(name)]
    if options.get("device") not in (None, "cpu"):
        on_gpu.append(f"device {options['device']}")
    if not on_gpu:
        return
    logger.warning("ignoring %s: videos are decoded on the CPU", ", ".join(on_gpu))
    for name in _GPU_OPTIONS:
        options.pop(name, None)
    if options.get("video_backend") in on_gpu:
        del options["video_backend"]


def keep_ffmpeg_out() -> None:
    """Let nothing open a file with FFmpeg in the server's own process, where vLLM would read the
    sound of clips for some models and routes."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        return
    av.open = _refuse_ffmpeg


def _refuse_ffmpeg(*_: Any, **__: Any) -> Any:
    raise ValueError("clips are decoded in separate processes only")


# ---------------------------------------------------------------------- decoding, in the child


def prepare(job: bytes, spare: SpareTime) -> Callable[[Data], Output]:
    """Import what a job needs and return the function that decodes; see `sandbox.Prepare`."""
    work = _prepared(job, spare)
    return lambda data: work(data[:])  # libraries want bytes


def _prepared(job: bytes, spare: SpareTime) -> Callable[[bytes], Output]:
    wanted = msgspec.msgpack.decode(job, type=VideoJob | PicturesJob | AudioJob)
    if isinstance(wanted, AudioJob):
        return _prepare_audio(wanted)
    module, _, name = wanted.sampling.loader.partition(":")
    loader = getattr(importlib.import_module(module), name)()
    if isinstance(wanted, PicturesJob):
        warm_up()
        return functools.partial(_pictures, wanted)
    _prepare_decoder(loader, wanted, spare)
    return functools.partial(_video, loader, wanted)


def _prepare_decoder(loader: Any, job: VideoJob, spare: SpareTime) -> None:
    """Import what the loader would import late, and let it decode with this project's decoder
    only."""
    try:
        frames = importlib.import_module("server.imaging.video.frames")
    except ImportError:
        raise ClientError(
            "this server decodes no videos, since the package av is not installed; "
            "pip install 'saccade[video]' adds it"
        ) from None
    decode = functools.partial(frames.decode, run=spare.run)
    video_decoder.install(decode, job.max_pixels)
    opencv: Any = cv2
    opencv.VideoCapture = _refuse_opencv
    with suppress(Exception):  # some loaders import modules when they choose frames
        loader.compute_frames_index_to_sample(
            source=VideoSourceMetadata(total_frames_num=8, original_fps=2.0, duration=4.0),
            target=VideoTargetMetadata(num_frames=4, fps=1, max_duration=4),
        )


def _refuse_opencv(*_: Any) -> Any:
    """In the place of OpenCV's own decoder, which guesses formats."""
    raise InvalidVideo("the video cannot be decoded with the requested options")


def _video(loader: Any, job: VideoJob, data: bytes) -> Output:
    try:
        frames, metadata = loader.load_bytes(
            data, num_frames=job.sampling.num_frames, **job.sampling.options
        )
    except Exception as error:
        raise _video_error(error) from error
    return _video_output(frames, metadata, data)


class _OwnPictures(ImageMediaIO):
    """Decodes pictures as image workers do. `load_base64` gets the number of one of `pictures`."""

    pictures: Sequence[bytes] = ()

    def load_base64(self, media_type: str, data: str) -> Any:
        options = DecodeOptions(self.image_mode, self.rgba_background_color)
        return decode_picture(self.pictures[int(data)], options).image


def _pictures(job: PicturesJob, data: bytes) -> Output:
    found, sampling = pictures.unpack(data), job.sampling
    _check_pictures(job, found)
    images = _OwnPictures(**sampling.image)
    images.pictures = found
    io = VideoMediaIO(images, sampling.num_frames, **sampling.options)
    try:
        frames, metadata = io.load_base64("video/jpeg", ",".join(map(str, range(len(found))))).media
    except Exception as error:
        raise _video_error(error) from error
    return _video_output(frames, metadata, data)


def _check_pictures(job: PicturesJob, found: Sequence[bytes]) -> None:
    """Check the headers of all pictures. Raises InvalidVideo or VideoTooLarge."""
    header = pictures.read(found)
    pixels = math.prod(header.size)
    if pixels > job.max_pixels or pixels * header.frame_count > job.max_total_pixels:
        raise VideoTooLarge(
            f"the frames of the video have too many pixels: the limit is {job.max_pixels} per "
            f"frame and {job.max_total_pixels} in all"
        )


def _video_output(frames: Any, metadata: dict[str, Any], data: bytes) -> Output:
    if not isinstance(frames, np.ndarray) or not len(frames):
        raise InvalidVideo("no frame of the video could be decoded")
    whole = [name for name, value in metadata.items() if value is data]
    kept = {name: value for name, value in metadata.items() if name not in whole}
    return Output(msgspec.msgpack.encode(VideoAnswer(kept, whole), enc_hook=_plain), [frames])


def _plain(value: Any) -> Any:
    """A numpy number or array as Python's numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise NotImplementedError


def _video_error(error: Exception) -> Exception:
    if isinstance(error, ClientError):
        return error
    if ran_out(error):
        return MemoryError()
    return InvalidVideo("the video could not be decoded with the requested options")


# ---------------------------------------------------------------------- sound


def _prepare_audio(job: AudioJob) -> Callable[[bytes], Output]:
    """Name the container to FFmpeg, which guesses it otherwise."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        pass  # soundfile may be there
    else:
        options = {"protocol_whitelist": "none", "format_whitelist": _DEMUXERS[job.container]}
        av.open = functools.partial(av.open, format=_DEMUXERS[job.container], options=options)
    return functools.partial(_audio, AudioMediaIO(audio_backend=job.backend))


def _audio(io: AudioMediaIO, data: bytes) -> Output:
    if data[4:8] == b"ftyp":
        refuse_references(data)
    try:
        waveform, rate = io.load_bytes(data)
    except ImportError:
        raise ClientError("this server has no decoder for audio clips") from None
    except Exception as error:
        if ran_out(error):
            raise MemoryError from error
        raise InvalidAudio("the audio clip is damaged or too long") from error
    answer = msgspec.msgpack.encode(AudioAnswer(rate), enc_hook=_plain)
    return Output(answer, [np.asarray(waveform, np.float32)])

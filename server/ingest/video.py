"""Decodes videos and audio clips in child processes: from bytes to frames or sound.

The caller names the decoder, as "module:function"; this package does not import it. The decoder
gets a `VideoJob`, a `PicturesJob` or an `AudioJob` in msgpack.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from server.errors import (
    AudioTooLarge,
    ClientError,
    InvalidAudio,
    InvalidVideo,
    MediaProcessingFailed,
    MediaProcessingTimeout,
    SaccadeError,
    UnsupportedVideoFormat,
    VideoTooLarge,
    WorkerLost,
)
from server.imaging.containers import AudioContainer, audio_container, video_container
from server.settings import VideoSettings
from server.workers.forkserver import Forkserver
from server.workers.sandbox import (
    JobDied,
    JobLost,
    JobRanOut,
    JobRefused,
    JobTimedOut,
    Output,
    Sandbox,
    SandboxLimits,
)

T = TypeVar("T")

_MIB = 1 << 20
# What a picture takes while a series of them is decoded, with some to spare.
_BYTES_PER_PIXEL = 8
# Errors that a job may report by their code.
_JOB_ERRORS: dict[str, type[SaccadeError]] = {
    error.code: error
    for error in (
        AudioTooLarge,
        ClientError,
        InvalidAudio,
        InvalidVideo,
        UnsupportedVideoFormat,
        VideoTooLarge,
    )
}
_TOO_LARGE = {"video": VideoTooLarge, "audio clip": AudioTooLarge}


class VideoOptions(msgspec.Struct, frozen=True):
    """How a video is sampled. `loader` is the "module:class" that chooses and decodes the frames;
    it gets `num_frames` and `options`. `image` has the options for a video sent as images."""

    loader: str
    num_frames: int
    options: dict[str, Any]
    image: dict[str, Any]


class VideoJob(msgspec.Struct, frozen=True, tag="video"):
    """Decode the file as `sampling` asks; a frame has at most `max_pixels`."""

    sampling: VideoOptions
    max_pixels: int


class PicturesJob(msgspec.Struct, frozen=True, tag="pictures"):
    """Decode the file, which is what `pictures.pack` makes of images: each of at most
    `max_pixels`, and all together of `max_total_pixels`."""

    sampling: VideoOptions
    max_pixels: int
    max_total_pixels: int


class AudioJob(msgspec.Struct, frozen=True, tag="audio"):
    """Decode the file to a waveform, with the library that `backend` names."""

    container: AudioContainer
    backend: str | None


class VideoAnswer(msgspec.Struct, frozen=True):
    """The metadata of a decoded video. Its entries under the keys in `whole_file` are the file,
    which is not sent back."""

    metadata: dict[str, Any]
    whole_file: list[str] = []


class AudioAnswer(msgspec.Struct, frozen=True):
    """`sample_rate` is in samples per second."""

    sample_rate: int | float


class DecodedVideo(NamedTuple):
    """`frames`: uint8 (frames, height, width, 3), RGB."""

    frames: npt.NDArray[np.uint8]
    metadata: dict[str, Any]


class DecodedAudio(NamedTuple):
    """`waveform`: float32 (samples,); `sample_rate` is in samples per second."""

    waveform: npt.NDArray[np.float32]
    sample_rate: int | float


class ClipDecoder:
    """Decodes videos and audio clips. `close` ends it."""

    def __init__(
        self, prepare: str, settings: VideoSettings, max_pixels: int, forkserver: Forkserver
    ) -> None:
        """`prepare` is the "module:function" that prepares for a job; see `sandbox.Prepare`."""
        self._prepare = prepare
        self._settings = settings
        self._max_pixels = max_pixels
        self._sandbox = Sandbox(
            SandboxLimits(
                processes=settings.video_workers,
                queue=settings.video_queue,
                timeout_s=settings.video_timeout_s,
                max_memory_bytes=settings.video_max_memory_mb * _MIB,
            ),
            forkserver,
        )

    @property
    def max_pixels(self) -> int:
        """Most pixels of a frame."""
        return self._max_pixels

    def close(self) -> None:
        """Accept no more clips."""
        self._sandbox.close()

    async def load_video(self, data: bytes, options: VideoOptions) -> DecodedVideo:
        """Decode those frames of the video file `data` that `options` select.

        Raises:
            UnsupportedVideoFormat, InvalidVideo, VideoTooLarge
            MediaProcessingTimeout, MediaProcessingFailed, WorkerLost
            ServerBusy: too many clips are waiting.
        """
        video_container(data)
        job = VideoJob(options, self._max_pixels)
        return self._video(await self._run("video", job, data), data)

    async def load_pictures(self, data: bytes, options: VideoOptions) -> DecodedVideo:
        """Decode a video that was sent as pictures, which `pictures.pack` has joined.

        Raises: as `load_video` does.
        """
        memory = self._settings.video_max_memory_mb * _MIB
        job = PicturesJob(options, self._max_pixels, memory // _BYTES_PER_PIXEL)
        return self._video(await self._run("video", job, data), data)

    async def load_audio(self, data: bytes, backend: str | None = None) -> DecodedAudio:
        """Decode the audio file `data`, at its own sample rate.

        Raises:
            UnsupportedAudioFormat, InvalidAudio, AudioTooLarge
            MediaProcessingTimeout, MediaProcessingFailed, WorkerLost
            ServerBusy: too many clips are waiting.
        """
        job = AudioJob(audio_container(data), backend)
        output = await self._run("audio clip", job, data)
        answer, waveform = _checked(output, AudioAnswer, "float32", 1)
        return DecodedAudio(waveform, answer.sample_rate)

    def _video(self, output: Output, data: bytes) -> DecodedVideo:
        answer, frames = _checked(output, VideoAnswer, "uint8", 4)
        return DecodedVideo(frames, answer.metadata | dict.fromkeys(answer.whole_file, data))

    async def _run(
        self,
        kind: Literal["video", "audio clip"],
        job: VideoJob | PicturesJob | AudioJob,
        data: bytes,
    ) -> Output:
        return await self.run(kind, self._prepare, msgspec.msgpack.encode(job), data)

    async def run(
        self,
        kind: Literal["video", "audio clip"],
        prepare: str,
        job: bytes,
        data: bytes,
        began: Callable[[], None] = lambda: None,
    ) -> Output:
        """Run `job`, prepared by the "module:function" `prepare`, in a child process. `began` is
        called when it is no longer waiting.

        Raises:
            ClientError, or another error that the job has raised.
            MediaProcessingTimeout, MediaProcessingFailed, WorkerLost
            ServerBusy: too many clips are waiting.
        """
        try:
            try:
                return await self._sandbox.run(prepare, job, data, began)
            except JobLost:  # as for pictures, a second attempt
                return await self._sandbox.run(prepare, job, data, began)
        except JobLost as lost:
            if lost.ran_out:
                raise MediaProcessingFailed(f"the {kind} takes more memory than there is") from None
            raise WorkerLost(f"the processes that decoded the {kind} were lost") from None
        except JobTimedOut:
            limit = self._settings.video_timeout_s
            raise MediaProcessingTimeout(
                f"decoding the {kind} took longer than {limit:g} s"
            ) from None
        except JobDied:
            raise MediaProcessingFailed(f"the {kind} could not be processed") from None
        except JobRanOut:
            raise _TOO_LARGE[kind](
                f"decoding the {kind} takes more memory than the limit allows"
            ) from None
        except JobRefused as error:
            raise _JOB_ERRORS.get(error.code, SaccadeError)(error.message) from None


def _checked(
    output: Output, kind: type[T], dtype: str, dimensions: int
) -> tuple[T, npt.NDArray[Any]]:
    """Check the answer and the one array of a job, which may come from a hijacked process."""
    try:
        (array,) = output.arrays
        answer = msgspec.msgpack.decode(output.answer, type=kind)
    except (ValueError, msgspec.MsgspecError):
        raise MediaProcessingFailed("the clip could not be processed") from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise MediaProcessingFailed("the clip could not be processed")
    return answer, array

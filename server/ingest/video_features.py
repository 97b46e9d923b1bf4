"""From a video file to the features that the model's processor makes of it, in one child process.

The child decodes the chosen frames and runs the processor on them, so that frames never come into
the server. Equal videos that are asked for at the same time are processed once.
"""

import asyncio
import ctypes
import math
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from server.errors import MediaProcessingFailed
from server.imaging.sizing import Size
from server.imaging.video.header import Form
from server.ingest.video import ClipDecoder
from server.telemetry import metrics
from server.telemetry.record import Record
from server.telemetry.stages import ImageWork
from server.workers.protocol import ArraySpec, Features, FeatureSpec, ListSpec
from server.workers.sandbox import Output

# Of one number, by the names of types that processors return.
_ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}


class VideoFeaturesJob(msgspec.Struct, frozen=True):
    """Decode frames of a video file and run the model's processor on them.

    Attributes:
        indices: the numbers of the frames, ascending; a frame may occur twice.
        size: (width, height) in pixels of a frame that is shown, as the header says.
        resize: (width, height) to which frames are resized first; None: they keep their size.
        metadata: what the processor is told of the video.
        kwargs: keyword arguments of the processor; see `jobs.encode_kwargs`.
        max_pixels: most pixels of a frame.
        form: what the file is.
        background: the colour under transparent pixels, where frames are pictures.
    """

    indices: tuple[int, ...]
    size: Size
    resize: Size | None
    metadata: dict[str, Any]
    kwargs: bytes
    max_pixels: int
    form: Form = "mp4"
    background: tuple[int, int, int] = (255, 255, 255)


class VideoFeaturesAnswer(msgspec.Struct, frozen=True):
    """`features` describes what lies in the one array of the output. Durations are in seconds."""

    features: dict[str, FeatureSpec]
    decode_s: float
    preprocess_s: float


@dataclass(eq=False)
class _Flight:
    task: "asyncio.Task[Features]"
    work: ImageWork
    waiters: int = 0


class VideoExtractor:
    """Makes features of videos."""

    def __init__(self, prepare: str, clips: ClipDecoder) -> None:
        """`prepare` is the "module:function" that prepares for a `VideoFeaturesJob`; see
        `sandbox.Prepare`. `clips` has the child processes."""
        self._prepare = prepare
        self._clips = clips
        self._flights: dict[str, _Flight] = {}

    @property
    def max_pixels(self) -> int:
        return self._clips.max_pixels

    async def process(
        self, key: str, data: bytes, job: VideoFeaturesJob, record: Record
    ) -> Features:
        """Run `job` on the file `data`. `key` identifies both; `record` belongs to the waiting
        request.

        Raises:
            InvalidVideo, VideoTooLarge
            MediaProcessingTimeout, MediaProcessingFailed, WorkerLost
            ServerBusy: too many clips are waiting.
        """
        came = time.monotonic()
        flight = self._flights.get(key)
        if flight is None:
            work = ImageWork(came)
            task = asyncio.create_task(self._run(key, data, job, work))
            flight = self._flights[key] = _Flight(task, work)
        flight.waiters += 1
        record.timeline.join(flight.work, came)
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._flights.pop(key, None)
                flight.task.cancel()

    async def _run(self, key: str, data: bytes, job: VideoFeaturesJob, work: ImageWork) -> Features:
        def began() -> None:
            work.given = time.monotonic()

        try:
            encoded = msgspec.msgpack.encode(job)
            output = await self._clips.run("video", self._prepare, encoded, data, began)
            features = _features(output, job.size)
            work.preprocess_s = features.preprocess_s
            metrics.video_decode.observe(features.decode_s)
            metrics.video_preprocess.observe(features.preprocess_s)
            return features
        finally:
            work.done = time.monotonic()
            if (flight := self._flights.get(key)) is not None and flight.work is work:
                del self._flights[key]


def _features(output: Output, size: Size) -> Features:
    """Check what may come from a hijacked process."""
    try:
        (array,) = output.arrays
        answer = msgspec.msgpack.decode(output.answer, type=VideoFeaturesAnswer)
        for spec in answer.features.values():
            _check(spec, array.nbytes)
    except (ValueError, msgspec.MsgspecError):
        raise MediaProcessingFailed("the video could not be processed") from None
    memory: Any = array
    buffer = (ctypes.c_char * array.nbytes).from_buffer(memory)
    return Features(answer.features, buffer, size, answer.decode_s, answer.preprocess_s)


def _check(spec: FeatureSpec, nbytes: int) -> None:
    """Raises ValueError if an array is not within `nbytes` bytes, or its type is unknown."""
    if isinstance(spec, ListSpec):
        for item in spec.items:
            _check(item, nbytes)
    elif isinstance(spec, ArraySpec):
        size = math.prod(spec.shape) * _ITEM_BYTES.get(spec.dtype, nbytes + 1)
        if min(spec.shape, default=0) < 0 or spec.offset < 0 or spec.offset + size > nbytes:
            raise ValueError

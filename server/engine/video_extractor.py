"""Decodes frames of a video and runs the model's processor on them, in a sandboxed child process.

The child is a fork of the workers' forkserver, which has the processor loaded.
"""

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from server.engine.extractor import ImageExtractor, resized
from server.errors import InvalidVideo, SaccadeError, ran_out
from server.imaging.video import header, stills
from server.imaging.video.header import Form
from server.ingest.video_features import VideoFeaturesAnswer, VideoFeaturesJob
from server.workers import preload
from server.workers.jobs import decode_kwargs
from server.workers.memory import bounded_memory
from server.workers.sandbox import Data, Output
from server.workers.shared_memory import ArrayWriter
from server.workers.spare_time import SpareTime
from server.workers.worker import describe

PREPARE = "server.engine.video_extractor:prepare"

# Decodes with PyAV, which the server itself never imports.
_FRAMES = "server.imaging.video.frames"
# What two small frames take at most, whatever options of the processor a request has.
_WARM_UP_BYTES = 1 << 30
_OPENERS: dict[Form, Callable[[bytes, int, tuple[int, int, int]], stills.DecodeFrame]] = {
    "pictures": stills.of_pictures,
    "animation": stills.of_animation,
}


def prepare(job: bytes, spare: SpareTime) -> Callable[[Data], Output]:
    """Import what a job needs and return the function that does it; see `sandbox.Prepare`."""
    wanted = msgspec.msgpack.decode(job, type=VideoFeaturesJob)
    extractor: Any = preload.loaded()[1]
    assert isinstance(extractor, ImageExtractor)
    with bounded_memory(_WARM_UP_BYTES):  # the sandbox sets its limits later
        extractor.warm_up_videos(decode_kwargs(wanted.kwargs))
    if wanted.form not in _OPENERS:
        importlib.import_module(_FRAMES)
    return functools.partial(_process, extractor, wanted, spare)


def _process(
    extractor: ImageExtractor, job: VideoFeaturesJob, spare: SpareTime, data: Data
) -> Output:
    started = time.perf_counter()
    try:
        frames = _decoded(job, cast("bytes", data), spare)
        decoded = time.perf_counter()
        # At this thread's own priority: one long step would wait long where all cores are busy.
        outputs = extractor.video_features(frames, job.metadata, decode_kwargs(job.kwargs))
    except SaccadeError:
        raise
    except Exception as error:
        if ran_out(error):
            raise MemoryError from error
        raise InvalidVideo("the model's processor cannot process this video") from error
    writer = ArrayWriter()
    specs = {name: describe(value, writer) for name, value in outputs.items()}
    buffer = np.empty(writer.nbytes, np.uint8)
    writer.write(buffer)
    preprocess_s = time.perf_counter() - decoded
    answer = VideoFeaturesAnswer(specs, decoded - started, preprocess_s)
    return Output(msgspec.msgpack.encode(answer), [buffer])


def _decoded(job: VideoFeaturesJob, data: bytes, spare: SpareTime) -> npt.NDArray[np.uint8]:
    """The frames of a job at the size that the processor gets: uint8 (frames, height, width, 3)."""
    resize = functools.partial(resized, size=job.resize) if job.resize else None
    if (opener := _OPENERS.get(job.form)) is not None:
        decode_frame = opener(data, job.max_pixels, job.background)
        return stills.frames(decode_frame, job.indices, job.size, job.resize, resize)
    if header.read(data).size != job.size:
        raise InvalidVideo("the frames of the video do not have the size in its header")
    decode = importlib.import_module(_FRAMES).decode
    frames: npt.NDArray[np.uint8] = decode(
        data, job.indices, job.resize, job.max_pixels, resize, spare.run
    )
    return frames

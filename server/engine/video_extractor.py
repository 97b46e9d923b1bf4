"""Decodes frames of a video and runs the model's processor on them, in a sandboxed child process.

The child is a fork of the workers' forkserver, which has the processor loaded.
"""

import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from server.engine.extractor import ImageExtractor, resized_frames
from server.errors import InvalidVideo, SaccadeError, VideoTooLarge
from server.imaging.sampling import pieces
from server.ingest.video_features import VideoFeaturesAnswer, VideoFeaturesJob
from server.workers import preload
from server.workers.jobs import decode_kwargs
from server.workers.sandbox import Output
from server.workers.shared_memory import ArrayWriter
from server.workers.worker import describe

PREPARE = "server.engine.video_extractor:prepare"

# Decodes with PyAV, which the server itself never imports.
_FRAMES = "server.imaging.video.frames"
# Frames that are decoded at their full size at a time, in bytes.
_CHUNK_BYTES = 32 << 20


def prepare(job: bytes) -> Callable[[bytes], Output]:
    """Import what a job needs and return the function that does it; see `sandbox.Prepare`."""
    wanted = msgspec.msgpack.decode(job, type=VideoFeaturesJob)
    extractor: Any = preload.loaded()[1]
    assert isinstance(extractor, ImageExtractor)
    extractor.warm_up_videos(decode_kwargs(wanted.kwargs))
    importlib.import_module(_FRAMES)
    return functools.partial(_process, extractor, wanted)


def _process(extractor: ImageExtractor, job: VideoFeaturesJob, data: bytes) -> Output:
    started = time.perf_counter()
    try:
        frames = _decoded(job, data)
        decoded = time.perf_counter()
        outputs = extractor.video_features(frames, job.metadata, decode_kwargs(job.kwargs))
    except MemoryError:
        raise VideoTooLarge(
            "the frames of the video take more memory than the limit allows"
        ) from None
    except SaccadeError:
        raise
    except Exception as error:
        raise InvalidVideo("the model's processor cannot process this video") from error
    writer = ArrayWriter()
    specs = {name: describe(value, writer) for name, value in outputs.items()}
    buffer = np.empty(writer.nbytes, np.uint8)
    writer.write(buffer)
    preprocess_s = time.perf_counter() - decoded
    answer = VideoFeaturesAnswer(specs, decoded - started, preprocess_s)
    return Output(msgspec.msgpack.encode(answer), [buffer])


def _decoded(job: VideoFeaturesJob, data: bytes) -> npt.NDArray[np.uint8]:
    """The frames of a job at the size that the processor gets: uint8 (frames, height, width, 3).
    At any time, few of them are held at their full size."""
    decode = importlib.import_module(_FRAMES).decode
    numbers = sorted(set(job.indices))
    width, height = job.size
    width_out, height_out = job.resize or job.size
    most = max(_CHUNK_BYTES // (3 * math.prod(job.size)), 1)
    different = np.empty((len(numbers), height_out, width_out, 3), np.uint8)
    for start, piece in pieces(numbers, most if job.resize else len(numbers)):
        frames = decode(data, piece, None, job.max_pixels)
        if frames.shape[1:3] != (height, width):
            raise InvalidVideo("the frames of the video do not have the size in its header")
        different[start : start + len(piece)] = resized_frames(frames, (width_out, height_out))
    if len(numbers) == len(job.indices):
        return different
    places = {number: place for place, number in enumerate(numbers)}
    return different[[places[number] for number in job.indices]]

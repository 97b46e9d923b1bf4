"""One image worker: a child process that turns one encoded picture at a time into features.

Children are forked from a server process in which `server.workers.preload` has loaded the
extractor, so that its memory is shared by all of them.
"""

import array
import gc
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import setproctitle
from PIL import Image

from server.errors import WORKER_ERRORS, SaccadeError
from server.imaging import pdf
from server.imaging.decode import Decoded, frame_count
from server.lifeline import die_with_parent
from server.workers import messages
from server.workers.memory import ArrayWriter, FreedMemory, Segment, keep_freed_memory

# Heap that a worker keeps between pictures: the 36 MB of a 12-megapixel picture several times.
_KEPT_HEAP_BYTES = 192 << 20
# Beyond that, and Pillow's arena, what a large picture took is given back.
_GROWTH_BYTES = 384 << 20
# Pillow's own arena, in blocks of 16 MiB.
_PILLOW_BLOCKS = 8
# Result segments that a worker keeps for the next pictures.
_KEPT_SEGMENTS = 4


class Array(NamedTuple):
    """`data` holds the bytes; `dtype` is the true type, which numpy may not know (bfloat16)."""

    dtype: str
    data: npt.NDArray[Any]


Feature: TypeAlias = "Array | Sequence[Feature] | int | float | str | None"


class Extractor(Protocol):
    """What a worker is handed: decoding and preprocessing for one model."""

    def decode(self, data: bytes, options: Mapping[str, Any]) -> Decoded: ...

    def features(self, decoded: Decoded, options: Mapping[str, Any]) -> dict[str, Feature]: ...


class WorkerSpec(msgspec.Struct, frozen=True):
    """How a worker gets its extractor: `factory` is "module:function", called with `payload`."""

    factory: str
    payload: bytes

    def load(self) -> Extractor:
        module, _, name = self.factory.partition(":")
        build: Callable[[bytes], Extractor] = getattr(importlib.import_module(module), name)
        return build(self.payload)


@dataclass
class _Segments:
    """The worker's result segments, by number; `free` may be written again."""

    all: dict[int, Segment]
    free: list[int]
    next_id: int = 0

    def take(self, nbytes: int) -> tuple[int, Segment, bool]:
        """The smallest free segment that holds `nbytes`, or a new one (then True)."""
        fitting = [number for number in self.free if self.all[number].capacity >= nbytes]
        if fitting:
            number = min(fitting, key=lambda n: self.all[n].capacity)
            self.free.remove(number)
            return number, self.all[number], False
        number, self.next_id = self.next_id, self.next_id + 1
        self.all[number] = Segment.create(nbytes)
        return number, self.all[number], True

    def shrink(self) -> list[int]:
        """Give surplus free segments back, smallest first; returns their numbers."""
        self.free.sort(key=lambda number: self.all[number].capacity)
        surplus = self.free[: max(0, len(self.free) - _KEPT_SEGMENTS)]
        self.free = self.free[len(surplus) :]
        for number in surplus:
            self.all.pop(number).close()
        return surplus


class Worker:
    """Serves jobs from `connection` until the other side closes it."""

    def __init__(self, connection: socket.socket, extractor: Extractor) -> None:
        self._connection = connection
        self._extractor = extractor
        self._segments = _Segments({}, [])
        self._input: Segment | None = None
        self._freed = FreedMemory(_GROWTH_BYTES)

    def run(self) -> None:
        self._send(messages.Ready(os.getpid()))
        while True:
            data, fds, _, _ = socket.recv_fds(self._connection, messages.MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            job = messages.job_decoder.decode(data)
            if job.input_grown:
                self._replace_input(fds[0])
            self._segments.free += job.released
            self._serve(job)
            self._freed.check()

    def _replace_input(self, fd: int) -> None:
        if self._input is not None:
            self._input.close()
        self._input = Segment(fd, os.fstat(fd).st_size)

    def _serve(self, job: messages.Job) -> None:
        try:
            self._answer(job, self._encoded(job))
        except SaccadeError as error:
            self._fail(job, error)
        except MemoryError:
            self._fail(job, SaccadeError("the image worker ran out of memory"))
        except Exception as error:  # the processor's own refusal of a picture
            kind = WORKER_ERRORS["invalid_image"] if isinstance(error, ValueError) else SaccadeError
            self._fail(job, kind("the model's image processor cannot process this image"))

    def _encoded(self, job: messages.Job) -> bytes:
        if job.inline is not None:
            return job.inline
        assert self._input is not None
        return self._input.map[: job.length]

    def _answer(self, job: messages.Job, data: bytes) -> None:
        started = decoded_at = time.perf_counter()
        options = messages.options_decoder.decode(job.options)
        size = (0, 0)
        if "inspect" in options:
            outputs = inspect(data, options)
        else:
            decoded = self._extractor.decode(data, options)
            decoded_at, size = time.perf_counter(), decoded.image.size
            outputs = self._extractor.features(decoded, options)
        writer = ArrayWriter()
        features = {name: _describe(value, writer) for name, value in outputs.items()}
        number, segment, is_new = self._segments.take(writer.nbytes)
        writer.write(segment.map)
        reply = messages.Done(
            id=job.id,
            segment=number,
            capacity=segment.capacity,
            is_new=is_new,
            dropped=self._segments.shrink(),
            features=features,
            size=size,
            decode_s=decoded_at - started,
            preprocess_s=time.perf_counter() - decoded_at,
        )
        self._send(reply, segment.fd if is_new else None)

    def _fail(self, job: messages.Job, error: SaccadeError) -> None:
        self._send(messages.Failed(job.id, error.code, error.message))

    def _send(self, message: messages.FromWorker, fd: int | None = None) -> None:
        data = messages.encoder.encode(message)
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._connection.sendmsg([data], ancillary)


def inspect(data: bytes, options: Mapping[str, Any]) -> dict[str, Feature]:
    """What is in a file, without its pictures: `count` of frames or pages and, of a PDF, the
    `sizes` of the first `most`: float64 (pages, 2), width and height in points."""
    if options["inspect"] == "pdf":
        sizes, count = pdf.page_sizes(data, options["most"])
        return {"sizes": Array("float64", np.array(sizes, np.float64)), "count": count}
    return {"count": frame_count(data)}


def _describe(value: Feature, writer: ArrayWriter) -> messages.FeatureSpec:
    if isinstance(value, Array):
        return messages.ArraySpec(value.dtype, value.data.shape, writer.add(value.data))
    if isinstance(value, list | tuple):
        return messages.ListSpec([_describe(item, writer) for item in value])
    if isinstance(value, int | float | str | None):
        return messages.ValueSpec(value)
    raise TypeError(f"an image processor returned {type(value).__name__}, which has no encoding")


def main(connection: socket.socket) -> None:
    """Entry point of the child process."""
    from server.workers import preload  # loaded in the parent by then; its memory is shared

    setproctitle.setproctitle("SACCADE::ImageWorker")
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the pool decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _volunteer_for_oom()
    keep_freed_memory(_KEPT_HEAP_BYTES)
    core: Any = vars(Image)["core"]
    core.set_blocks_max(_PILLOW_BLOCKS)
    gc.freeze()
    try:
        Worker(connection, preload.extractor()).run()
    except (ConnectionError, BrokenPipeError):
        return


def _volunteer_for_oom() -> None:
    """When memory runs out, lose one picture rather than the server."""
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")
    except OSError:
        return

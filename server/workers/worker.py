"""One image worker: a child process that turns one encoded picture at a time into features.

Children are forked from a server process in which `server.workers.preload` has loaded the
extractor, so that its memory is shared by all of them.
"""

import array
import gc
import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from server.errors import WORKER_ERRORS, SaccadeError
from server.imaging import pdf
from server.imaging.decode import Decoded, frame_count
from server.workers import protocol
from server.workers.jobs import (
    CountFrames,
    InspectPdf,
    Job,
    PictureJob,
    PixelsJob,
    ProcessJob,
)
from server.workers.process import FreedMemory, keep_freed_memory, start_child
from server.workers.shared_memory import ArrayWriter, Segment

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
    """Decoding and preprocessing for one model."""

    def decode(self, data: bytes, job: PictureJob) -> Decoded:
        """The picture in the size and mode that `job` wants; a `ProcessJob` may be decoded at a
        smaller scale where the processor would shrink it anyway."""
        ...

    def features(self, decoded: Decoded, job: ProcessJob) -> dict[str, Feature]:
        """What the model's processor makes of `decoded`."""
        ...


class WorkerSpec(msgspec.Struct, frozen=True):
    """How a worker gets its extractor: `factory` is "module:function", called with `payload`."""

    factory: str
    payload: bytes

    def load(self) -> Extractor:
        module, _, name = self.factory.partition(":")
        build: Callable[[bytes], Extractor] = getattr(importlib.import_module(module), name)
        return build(self.payload)


class _Segments:
    """The worker's result segments by number; those in `free` may be written again."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self._all: dict[int, Segment] = {}
        self._next_number = 0

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[tuple[int, Segment, bool]]:
        """The smallest free segment that holds `nbytes`, or a new one (then True). Whoever reads
        the result frees it; if there is none, it is taken back."""
        number, is_new = self._take(nbytes)
        try:
            yield number, self._all[number], is_new
        except BaseException:
            if is_new:  # the other side does not know it
                self._all.pop(number).close()
            else:
                self.free.append(number)
            raise

    def _take(self, nbytes: int) -> tuple[int, bool]:
        fitting = [number for number in self.free if self._all[number].capacity >= nbytes]
        if fitting:
            number = min(fitting, key=lambda number: self._all[number].capacity)
            self.free.remove(number)
            return number, False
        number, self._next_number = self._next_number, self._next_number + 1
        self._all[number] = Segment.create(nbytes)
        return number, True

    def surplus(self) -> list[int]:
        """Free segments that are more than the next pictures need, smallest first."""
        self.free.sort(key=lambda number: self._all[number].capacity)
        return self.free[: max(0, len(self.free) - _KEPT_SEGMENTS)]

    def drop(self, numbers: Sequence[int]) -> None:
        """Give free segments back to the system."""
        for number in numbers:
            self.free.remove(number)
            self._all.pop(number).close()


class Worker:
    """Serves jobs from `connection` until the other side closes it."""

    def __init__(self, connection: socket.socket, extractor: Extractor) -> None:
        self._connection = connection
        self._extractor = extractor
        self._segments = _Segments()
        self._input: Segment | None = None
        self._freed = FreedMemory(_GROWTH_BYTES)

    def run(self) -> None:
        self._send(protocol.Ready())
        while True:
            data, fds, _, _ = socket.recv_fds(self._connection, protocol.MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            request = protocol.request_decoder.decode(data)
            if request.input_grown:
                self._replace_input(fds[0])
            self._segments.free += request.released
            self._serve(request)
            self._freed.check()

    def _replace_input(self, fd: int) -> None:
        if self._input is not None:
            self._input.close()
        self._input = Segment(fd, os.fstat(fd).st_size)

    def _serve(self, request: protocol.WorkRequest) -> None:
        try:
            self._answer(request.id, protocol.job_decoder.decode(request.job), self._file(request))
        except SaccadeError as error:
            self._fail(request.id, error)
        except MemoryError:
            self._fail(request.id, SaccadeError("the image worker ran out of memory"))
        except Exception as error:  # the processor refuses the picture
            kind = WORKER_ERRORS["invalid_image"] if isinstance(error, ValueError) else SaccadeError
            message = "the model's image processor cannot process this image"
            self._fail(request.id, kind(message))

    def _file(self, request: protocol.WorkRequest) -> bytes:
        if request.inline is not None:
            return request.inline
        assert self._input is not None
        return self._input.map[: request.length]

    def _answer(self, id_: int, job: Job, data: bytes) -> None:
        started = decoded_at = time.perf_counter()
        size = None
        if isinstance(job, InspectPdf | CountFrames):
            outputs = inspect(data, job)
        else:
            decoded = self._extractor.decode(data, job)
            decoded_at, size = time.perf_counter(), decoded.image.size
            if isinstance(job, ProcessJob):
                outputs = self._extractor.features(decoded, job)
            else:
                outputs = _pixels(decoded, job)
        writer = ArrayWriter()
        features = {name: _describe(value, writer) for name, value in outputs.items()}
        with self._segments.taken(writer.nbytes) as (number, segment, is_new):
            writer.write(segment.map)
            reply = protocol.Done(
                id=id_,
                segment=number,
                capacity=segment.capacity,
                is_new=is_new,
                dropped=self._segments.surplus(),
                features=features,
                size=size,
                decode_s=decoded_at - started,
                preprocess_s=time.perf_counter() - decoded_at,
            )
            self._send(reply, segment.fd if is_new else None)
        self._segments.drop(reply.dropped)

    def _fail(self, id_: int, error: SaccadeError) -> None:
        self._send(protocol.Failed(id_, error.code, error.message))

    def _send(self, message: protocol.FromWorker, fd: int | None = None) -> None:
        data = protocol.encoder.encode(message)
        if len(data) > protocol.MAX_MESSAGE_BYTES:
            raise SaccadeError("the image processor returned too many lists and numbers")
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._connection.sendmsg([data], ancillary)


def inspect(data: bytes, job: InspectPdf | CountFrames) -> dict[str, Feature]:
    """What is in a file, without decoding its pictures; see the jobs."""
    if isinstance(job, InspectPdf):
        sizes, count = pdf.page_sizes(data, job.max_pages)
        return {"sizes": Array("float64", np.array(sizes, np.float64)), "count": count}
    return {"count": frame_count(data)}


def _pixels(decoded: Decoded, job: PixelsJob) -> dict[str, Feature]:
    pixels = np.asarray(decoded.image)
    return {"pixels": Array(pixels.dtype.name, pixels)}


def _describe(value: Feature, writer: ArrayWriter) -> protocol.FeatureSpec:
    if isinstance(value, Array):
        return protocol.ArraySpec(value.dtype, value.data.shape, writer.add(value.data))
    if isinstance(value, list | tuple):
        return protocol.ListSpec([_describe(item, writer) for item in value])
    if isinstance(value, int | float | str | None):
        return protocol.ValueSpec(value)
    raise TypeError(f"an image processor returned {type(value).__name__}, which has no encoding")


def main(connection: socket.socket) -> None:
    """Entry point of the child process."""
    from server.workers import preload  # loaded in the parent by then; its memory is shared

    start_child("SACCADE::ImageWorker")
    keep_freed_memory(_KEPT_HEAP_BYTES)
    core: Any = vars(Image)["core"]
    core.set_blocks_max(_PILLOW_BLOCKS)
    gc.freeze()
    try:
        Worker(connection, preload.extractor()).run()
    except (ConnectionError, BrokenPipeError):
        return

"""An image worker: a child process that turns one encoded picture at a time into features.

Workers are forked from the forkserver, in which `server.workers.preload` has loaded the extractor,
so all of them share its memory.
"""

import array
import importlib
import math
import mmap
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from server.errors import ImageTooLarge, InvalidImage, PdfTooComplex, SaccadeError
from server.imaging import detail, pdf
from server.imaging.convert import array_of
from server.imaging.decode import Decoded, OpenAnimation, frame_count
from server.workers import protocol
from server.workers.confinement import (
    FONT_DIRECTORIES,
    Confinement,
    SandboxMode,
    confine,
    lower_limit,
)
from server.workers.jobs import (
    CountFrames,
    FindDetail,
    InspectPdf,
    Job,
    PdfText,
    PictureJob,
    PixelsJob,
    ProcessJob,
)
from server.workers.memory import (
    FreedMemory,
    allocated_bytes,
    keep_freed_memory,
    return_freed_memory,
)
from server.workers.process import start_child
from server.workers.shared_memory import ArrayWriter, Segment
from server.workers.work_limit import WorkLimit

# Freed heap that a worker keeps between pictures: several times the 36 MB of 12 megapixels.
_KEPT_HEAP_BYTES = 192 << 20
# A worker that has grown by more than this returns its freed heap.
_GROWTH_BYTES = 384 << 20
# Most blocks of 16 MiB in Pillow's arena.
_PILLOW_BLOCKS = 8
# Memory that PDFium may take besides the bitmap: it holds all objects of a page.
MAX_PDF_BYTES = 512 << 20
# The server hears that a picture is decoded if that took so long. Else the result follows soon.
_LONG_DECODE_S = 0.02
# A worker that waits for so long for a picture returns the memory that it keeps.
_IDLE_S = 10.0
# Result segments that a worker keeps for the next pictures.
_KEPT_SEGMENTS = 4
# Open descriptors: a segment takes two, and results that are in use have one each.
_MAX_FILES = 4096


class Array(NamedTuple):
    """`data` holds the bytes; `dtype` is the true type, which numpy may not know (bfloat16)."""

    dtype: str
    data: npt.NDArray[Any]


Feature: TypeAlias = "Array | Sequence[Feature] | int | float | str | None"


class Extractor(Protocol):
    """Decoding and preprocessing for one model."""

    @property
    def files(self) -> Sequence[str]:
        """The files that it opens when it gets options which it has not seen before."""
        ...

    @property
    def needs_files(self) -> bool:
        """Whether options are usual for which it opens `files`."""
        ...

    def decode(
        self, data: bytes, job: PictureJob, animation: OpenAnimation | None = None
    ) -> Decoded:
        """Decode a picture to the size and mode of `job`. For a `ProcessJob`, the picture may be
        smaller if the processor would shrink it anyway. `animation`: see `imaging.decode`."""
        ...

    def features(self, decoded: Decoded, job: ProcessJob) -> dict[str, Feature]:
        """The fields that the model's processor returns for `decoded`, by name."""
        ...


class WorkerSpec(msgspec.Struct, frozen=True):
    """How a worker builds its extractor: `factory`, "module:function", is called with `payload`.

    `pdf_page_timeout_s` is the processor time that a page of a PDF may take, in seconds. A worker
    may allocate `max_memory_bytes`, and confines itself by `sandbox`.
    """

    factory: str
    payload: bytes
    pdf_page_timeout_s: float = 5.0
    max_memory_bytes: int = 4 << 30
    sandbox: SandboxMode = "auto"

    def load(self) -> Extractor:
        module, _, name = self.factory.partition(":")
        build: Callable[[bytes], Extractor] = getattr(importlib.import_module(module), name)
        return build(self.payload)


class _Segments:
    """The worker's result segments by number; those in `free` may be reused."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self._all: dict[int, Segment] = {}
        self._next_number = 0

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[tuple[int, Segment, bool]]:
        """Take the smallest free segment of at least `nbytes`, or create one; yields its number,
        the segment, and whether it is new. The reader of the result releases it; if the body
        raises, it is released at once."""
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
        """The free segments beyond `_KEPT_SEGMENTS`, smallest first."""
        self.free.sort(key=lambda number: self._all[number].capacity)
        return self.free[: max(0, len(self.free) - _KEPT_SEGMENTS)]

    def clear(self) -> None:
        """Return the memory of the free segments to the system, and keep the segments."""
        for number in self.free:
            self._all[number].map.madvise(mmap.MADV_REMOVE)

    def drop(self, numbers: Sequence[int]) -> None:
        """Return the memory of free segments to the system."""
        for number in numbers:
            self.free.remove(number)
            self._all.pop(number).close()


class Worker:
    """Runs the jobs that arrive on `connection` until the server closes it."""

    def __init__(
        self, connection: socket.socket, extractor: Extractor, pdf_page_timeout_s: float
    ) -> None:
        self._connection = connection
        self._extractor = extractor
        self._pdf_page_timeout_s = pdf_page_timeout_s
        self._segments = _Segments()
        self._input: Segment | None = None
        self._freed = FreedMemory(_GROWTH_BYTES)

    def announce(self, confinement: Confinement) -> None:
        """Tell the server that this worker has started."""
        self._send(protocol.Ready(confinement))

    def run(self) -> None:
        """Answer requests until the server closes the connection."""
        while True:
            if not select.select([self._connection], (), (), _IDLE_S)[0]:
                self._return_memory()
            data, fds, _, _ = socket.recv_fds(self._connection, protocol.MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            request = protocol.request_decoder.decode(data)
            if request.input_grown:
                self._replace_input(fds[0])
            self._segments.free += request.released
            self._serve(request)
            self._freed.check()

    def _return_memory(self) -> None:
        """Keep nothing for the next picture, which may not come for long."""
        self._segments.clear()
        clear_pillow_cache()
        return_freed_memory()

    def _replace_input(self, fd: int) -> None:
        if self._input is not None:
            self._input.close()
        self._input = Segment(fd, os.fstat(fd).st_size)

    def _serve(self, request: protocol.WorkRequest) -> None:
        data = self._file(request)
        animation = OpenAnimation() if len(request.jobs) > 1 else None
        for id_, job in enumerate(request.jobs, request.id):
            try:
                self._answer(id_, protocol.job_decoder.decode(job), data, animation)
            except SaccadeError as error:
                self._fail(id_, error)
            except MemoryError:
                self._fail(id_, ImageTooLarge("the image takes more memory than there is"))
            except Exception as error:  # the processor refuses the picture
                kind = InvalidImage if isinstance(error, ValueError) else SaccadeError
                self._fail(id_, kind("the model's image processor cannot process this image"))

    def _file(self, request: protocol.WorkRequest) -> bytes:
        if request.inline is not None:
            return request.inline
        assert self._input is not None
        return self._input.map[: request.length]

    def _answer(self, id_: int, job: Job, data: bytes, animation: OpenAnimation | None) -> None:
        started = decoded_at = time.perf_counter()
        size = None
        if isinstance(job, InspectPdf | PdfText | CountFrames):
            with self._limited(id_, job):
                outputs = inspect(data, job)
        else:
            with self._limited(id_, job):
                decoded = self._extractor.decode(data, job, animation)
            decoded_at, size = time.perf_counter(), decoded.image.size
            if isinstance(job, ProcessJob):
                if decoded_at - started > _LONG_DECODE_S:
                    self._send(protocol.Decoded(id_))
                outputs = self._extractor.features(decoded, job)
            elif isinstance(job, FindDetail):
                outputs = {"blocks": Array("int32", detail.blocks(decoded.image))}
            else:
                outputs = _pixels(decoded, job)
        writer = ArrayWriter()
        features = {name: describe(value, writer) for name, value in outputs.items()}
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

    def _limited(self, id_: int, job: Job) -> AbstractContextManager[None]:
        """Limits time and memory for a PDF, which no header tells in advance."""
        if isinstance(job, InspectPdf | PdfText):
            bitmap_bytes = 0
        elif isinstance(job, PictureJob) and job.format == "PDF":
            bitmap_bytes = 3 * math.prod(job.resize or job.size)
        else:
            return nullcontext()
        limit = WorkLimit(self._pdf_page_timeout_s, bitmap_bytes + MAX_PDF_BYTES)
        error = PdfTooComplex("a page of the PDF is too complex: it takes too much time or memory")
        return limit.enforced(lambda: self._fail(id_, error, ends=True))

    def _fail(self, id_: int, error: SaccadeError, *, ends: bool = False) -> None:
        self._send(protocol.Failed(id_, error.code, error.message, ends))

    def _send(self, message: protocol.FromWorker, fd: int | None = None) -> None:
        data = protocol.encoder.encode(message)
        if len(data) > protocol.MAX_MESSAGE_BYTES:
            raise SaccadeError("the image processor returned too many values outside of arrays")
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._connection.sendmsg([data], ancillary)


def inspect(data: bytes, job: InspectPdf | PdfText | CountFrames) -> dict[str, Feature]:
    """Tell what is in a file without decoding its pictures; see the three jobs."""
    if isinstance(job, InspectPdf):
        sizes, count = pdf.page_sizes(data, job.max_pages)
        return {"sizes": Array("float64", np.array(sizes, np.float64)), "count": count}
    if isinstance(job, PdfText):
        text = pdf.text(data, job.page, job.max_characters).encode()
        return {"text": Array("uint8", np.frombuffer(text, np.uint8))}
    return {"count": frame_count(data)}


def _pixels(decoded: Decoded, job: PixelsJob) -> dict[str, Feature]:
    pixels = array_of(decoded.image)
    return {"pixels": Array(pixels.dtype.name, pixels)}


def describe(value: Feature, writer: ArrayWriter) -> protocol.FeatureSpec:
    """How a feature lies in the buffer of `writer`, to which its arrays are added."""
    if isinstance(value, Array):
        return protocol.ArraySpec(value.dtype, value.data.shape, writer.add(value.data))
    if isinstance(value, list | tuple):
        return protocol.ListSpec([describe(item, writer) for item in value])
    if isinstance(value, int | float | str | None):
        return protocol.ValueSpec(value)
    raise TypeError(f"the image processor returned an unsupported type: {type(value).__name__}")


def clear_pillow_cache() -> None:
    """Free the blocks that Pillow keeps for later pictures."""
    core: Any = vars(Image)["core"]
    core.clear_cache()


def main(fds: list[int]) -> None:
    """Entry point of the forked process, which gets one end of its connection to the server."""
    from server.workers import preload  # already loaded in the forkserver

    spec, extractor = preload.loaded()
    start_child("SACCADE::ImageWorker")
    keep_freed_memory(_KEPT_HEAP_BYTES)
    core: Any = vars(Image)["core"]
    core.set_blocks_max(_PILLOW_BLOCKS)
    (fd,) = fds
    worker = Worker(socket.socket(fileno=fd), extractor, spec.pdf_page_timeout_s)
    _limit_resources(spec.max_memory_bytes)
    confinement = confine(
        spec.sandbox, FONT_DIRECTORIES, extractor.files, needs_files=extractor.needs_files
    )
    with suppress(ConnectionError):
        worker.announce(confinement)
        if confinement.suffices(spec.sandbox):
            worker.run()


def _limit_resources(memory_bytes: int) -> None:
    """Limit memory and descriptors. The server limits the time of each job."""
    lower_limit(resource.RLIMIT_DATA, allocated_bytes() + memory_bytes)
    lower_limit(resource.RLIMIT_FSIZE, memory_bytes)  # applies to shared memory
    lower_limit(resource.RLIMIT_NOFILE, _MAX_FILES)
    lower_limit(resource.RLIMIT_CORE, 0)  # it would contain the images of clients

"""Runs a job on an untrusted file in a separate child process with limits on memory and time.

    result = await sandbox.run("module:function", job, data)

The child is forked from the image workers' forkserver, which has the libraries loaded. It gets the
job and the data in a memfd and returns its arrays in another one. While the job runs, the child is
confined as image workers are, and can open no file at all. The child pickles nothing, so a
compromised child can return wrong numbers but cannot inject code.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import importlib
import math
import mmap
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from server.errors import SaccadeError, ServerBusy
from server.workers import preload
from server.workers.confinement import confine, lower_limit
from server.workers.forked_process import ForkedProcess
from server.workers.forkserver import Forkserver, ForkserverLost
from server.workers.memory import keep_freed_memory, mapped_bytes
from server.workers.process import (
    KILLED,
    has_worked,
    out_of_memory_kills,
    processor_seconds,
    start_child,
)
from server.workers.shared_memory import ALIGNMENT
from server.workers.spare_time import SpareTime

# Limit for forking a child and for the imports that are left to it.
_START_TIMEOUT_S = 120.0
# Most bytes of one write.
_WRITE_BYTES = 1 << 30
_LENGTH = struct.Struct("<Q")
_M_ARENA_MAX = -8
# A child gets a quarter of a processor that the server or the engine wants too.
_NICENESS = 5
# Freed heap that a child keeps: several buffers of a frame.
_KEPT_HEAP_BYTES = 64 << 20
# FFmpeg's limit for the threads of a decoder.
_MAX_THREADS = 16


@dataclass(frozen=True)
class SandboxLimits:
    """At most `processes` jobs run at a time and `queue` more wait. A job may run for `timeout_s`
    seconds and map `max_memory_bytes` beyond the memory of an idle child."""

    processes: int
    queue: int
    timeout_s: float
    max_memory_bytes: int


@dataclass(frozen=True)
class Output:
    """The result of a job: uint8 or float32 arrays, and `answer`, in a format of the job's
    choice."""

    answer: bytes
    arrays: list[npt.NDArray[Any]] = field(default_factory=list)


# The data of a job in the child: a mapping, which reads as bytes do. `data[:]` is a copy.
Data: TypeAlias = bytes | mmap.mmap
# Takes an encoded job, imports modules and opens files for it, and returns the function that runs
# it on the data. That function is called when the limits are in place and nothing can be opened;
# it may run steps of the job in spare time.
Prepare: TypeAlias = Callable[[bytes, SpareTime], Callable[[Data], Output]]


class JobTimedOut(Exception):
    """The job took longer than its limit, worked meanwhile, and its process was killed."""


class JobDied(Exception):
    """The process died, or its result is damaged."""


class JobLost(Exception):
    """The process was killed or stopped by others, or its end is unknown. The job is not at fault,
    unless `ran_out` is set: the kernel has killed a process for memory meanwhile."""

    def __init__(self, *, ran_out: bool = False) -> None:
        super().__init__()
        self.ran_out = ran_out


class JobRanOut(Exception):
    """The job took more memory than its limit."""


class JobRefused(Exception):
    """The job raised an error of `server.errors`, with this `code` and `message`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _Placed(msgspec.Struct, frozen=True):
    """An array in the result; `offset` is in bytes."""

    dtype: Literal["uint8", "float32"]
    shape: tuple[int, ...]
    offset: int


class _Done(msgspec.Struct, frozen=True, tag="done"):
    answer: bytes
    arrays: list[_Placed]


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    code: str
    message: str


class _RanOut(msgspec.Struct, frozen=True, tag="ran_out"):
    pass


class _Call(msgspec.Struct, frozen=True):
    """What the child runs: `prepare`, "module:function", prepares `job`."""

    prepare: str
    job: bytes
    timeout_s: float
    max_memory_bytes: int
    spare_time: bool


class Sandbox:
    """Runs each job in a separate process. Call `close` at the end."""

    def __init__(self, limits: SandboxLimits, forkserver: Forkserver) -> None:
        self.limits = limits
        self._forkserver = forkserver
        self._slots = asyncio.Semaphore(limits.processes)
        self._waiting = self._running = 0
        self._threads = ThreadPoolExecutor(limits.processes, "sandbox")

    def close(self) -> None:
        """Accept no more jobs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(
        self, prepare: str, job: bytes, data: bytes, began: Callable[[], None] = lambda: None
    ) -> Output:
        """Run `job` on `data`, prepared by the "module:function" `prepare`; see `Prepare`. `began`
        is called when a process is started.

        If the caller is cancelled, the process is killed.

        Raises:
            ServerBusy: too many jobs wait, or no process can be started.
            JobRefused, JobRanOut, JobTimedOut, JobDied, JobLost
        """
        if self._waiting >= self.limits.queue:
            raise ServerBusy(f"{self._waiting} videos wait to be decoded, which is the limit")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        began()
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # no file is free
            self._slots.release()
            raise
        self._running += 1
        # Where jobs could use all cores, processes that wait actively would leave them no time.
        spare = self._running < len(os.sched_getaffinity(0))
        limits = self.limits
        call = _Call(prepare, job, limits.timeout_s, limits.max_memory_bytes, spare)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, _run, self._forkserver, call, data, theirs)
        work.add_done_callback(self._free)
        with ours:  # closing it tells the thread that the caller has left
            return await asyncio.shield(work)

    def _free(self, work: asyncio.Future[Output]) -> None:
        self._running -= 1
        self._slots.release()
        if not work.cancelled():
            work.exception()  # read it: else asyncio warns if the caller has left


# ---------------------------------------------------------------------- in a thread of the server


def _run(forkserver: Forkserver, call: _Call, data: bytes, caller: socket.socket) -> Output:
    """Run one child from start to end; `caller` becomes readable when the caller has left."""
    with contextlib.ExitStack() as opened:
        opened.enter_context(caller)
        source, result = opened.enter_context(_memfd()), opened.enter_context(_memfd())
        _write(source, memoryview(data), 0)
        encoded = msgspec.msgpack.encode(call)
        _write(source, memoryview(encoded + _LENGTH.pack(len(encoded))), len(data))
        memory_kills = out_of_memory_kills()
        ready, child_ready = os.pipe()
        with os.fdopen(ready, "rb") as reader, os.fdopen(child_ready, "wb") as writer:
            process = _start(forkserver, [source, result, child_ready])
            try:
                writer.close()  # so that the end of the child is seen
                _await(process, reader.fileno(), caller, call.timeout_s)
            finally:
                process.end()
        output = _read(result)
        if output is not None:
            return output
        status = process.exit_code()
        if status == -signal.SIGXCPU:
            raise JobTimedOut
        if status is None or status in KILLED:
            raise JobLost(ran_out=out_of_memory_kills() > memory_kills)
        raise JobDied(f"the process ended with status {status}")


def _start(forkserver: Forkserver, fds: list[int]) -> ForkedProcess:
    try:
        return forkserver.fork("server.workers.sandbox:_main", fds)
    except ForkserverLost as error:
        raise JobLost from error
    except OSError as error:  # no memory, or too many processes or files
        raise ServerBusy("failed to start a process for decoding videos") from error


def _await(process: ForkedProcess, ready: int, caller: socket.socket, timeout_s: float) -> None:
    """Wait until the child has exited. `timeout_s` counts from when it is ready."""
    left = caller.fileno()
    first = _readable([ready, process.sentinel, left], _START_TIMEOUT_S)
    if ready in first and process.sentinel not in first:
        since_s = processor_seconds(process.pid)
        ended = _readable([process.sentinel, left], timeout_s)
        if not ended:
            raise JobTimedOut if has_worked(process.pid, since_s, timeout_s) else JobLost
        if process.sentinel not in ended:
            raise JobDied("the caller of the job has left")


def _readable(fds: list[int], timeout_s: float) -> set[int]:
    """Wait until one of `fds` is readable or closed at the other end; empty after `timeout_s`."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(timeout_s * 1e3)}


def _read(fd: int) -> Output | None:
    """The result of a child that has exited; None if it exited before it had one.

    Raises:
        JobRefused, JobRanOut, JobDied
    """
    # Another holder of the descriptor could truncate the file under the mapping.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    size = os.fstat(fd).st_size
    if size < _LENGTH.size:
        return None
    try:
        memory = mmap.mmap(fd, size)
        (length,) = _LENGTH.unpack_from(memory)
        if length == 0:
            return None
        head = memory[_LENGTH.size : _LENGTH.size + length]
        reply = msgspec.msgpack.decode(head, type=_Done | _Failed | _RanOut)
        if isinstance(reply, _Failed):
            raise JobRefused(reply.code, reply.message)
        if isinstance(reply, _RanOut):
            raise JobRanOut
        return Output(reply.answer, [_array(memory, each) for each in reply.arrays])
    except (ValueError, struct.error, msgspec.MsgspecError):
        raise JobDied("the result is damaged") from None


def _array(memory: mmap.mmap, placed: _Placed) -> npt.NDArray[Any]:
    """An array over the memory. Raises ValueError if it does not fit into it."""
    if min(placed.shape, default=0) < 0:
        raise ValueError
    count = math.prod(placed.shape)
    if count == 0:
        return np.empty(placed.shape, placed.dtype)
    return np.frombuffer(memory, placed.dtype, count, placed.offset).reshape(placed.shape)


@contextlib.contextmanager
def _memfd() -> Iterator[int]:
    fd = os.memfd_create("saccade-clip", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield fd
    finally:
        os.close(fd)


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # a write releases the GIL, unlike a copy into a mapping
        done += os.pwrite(fd, data[done : done + _WRITE_BYTES], offset + done)


# ---------------------------------------------------------------------- in the child


def _main(fds: list[int]) -> None:
    """Entry point of the child process."""
    source, result, ready = fds
    start_child("SACCADE::VideoDecoder")
    os.nice(_NICENESS)
    call, data = _received(source)
    module, _, name = call.prepare.partition(":")
    prepare: Prepare = getattr(importlib.import_module(module), name)
    reply: _Failed | _RanOut
    try:
        work = prepare(call.job, SpareTime(allowed=call.spare_time))
        os.write(ready, b"!")
        _confine(call)
        output = work(data)
        arrays = [np.ascontiguousarray(array) for array in output.arrays]
        _put(result, _Done(output.answer, []), arrays)
        return
    except SaccadeError as error:
        reply = _Failed(error.code, error.message)
    except MemoryError:
        reply = _RanOut()
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        reply = _RanOut()  # memory that was free before held more than the limit
    _put(result, reply, [])


def _received(source: int) -> tuple[_Call, Data]:
    """The call and its data, which stand in a file in the reverse order: the data can be mapped
    then, since it begins with a page."""
    size = os.fstat(source).st_size
    (length,) = _LENGTH.unpack(os.pread(source, _LENGTH.size, size - _LENGTH.size))
    end = size - _LENGTH.size - length
    call = msgspec.msgpack.decode(os.pread(source, length, end), type=_Call)
    return call, mmap.mmap(source, end, access=mmap.ACCESS_READ) if end else b""


def _confine(call: _Call) -> None:
    """Confine this process and set its limits, which it cannot raise again."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, 1)  # each thread's arena would reserve 64 MiB of address space
    keep_freed_memory(_KEPT_HEAP_BYTES)
    cores = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    seconds = math.ceil(call.timeout_s * cores) + 1
    lower_limit(resource.RLIMIT_AS, mapped_bytes() + call.max_memory_bytes)
    lower_limit(resource.RLIMIT_FSIZE, call.max_memory_bytes)
    lower_limit(resource.RLIMIT_CPU, seconds + 1)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    # At the hard limit the kernel sends SIGKILL, at the soft one SIGXCPU, which says why.
    resource.setrlimit(resource.RLIMIT_CPU, (min(seconds, hard), hard))
    lower_limit(resource.RLIMIT_CORE, 0)
    lower_limit(resource.RLIMIT_NOFILE, 0)  # open ones stay open; no more can be opened
    mode = preload.sandbox_mode()
    if not (confinement := confine(mode)).suffices(mode):
        raise RuntimeError(f"cannot confine this process: {', '.join(confinement.refused)}")


def _put(fd: int, reply: _Done | _Failed | _RanOut, arrays: list[npt.NDArray[Any]]) -> None:
    """Write the result: the length of the head, the head, and then the arrays. The length is
    written last, so an incomplete result has none."""
    placed: list[_Placed] = []
    if isinstance(reply, _Done):
        # An upper bound for the length of the head; there are few arrays.
        offset = _LENGTH.size + len(reply.answer) + 256 * (1 + len(arrays))
        for array in arrays:
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            dtype: Any = array.dtype.name
            placed.append(_Placed(dtype, array.shape, offset))
            offset += array.nbytes
        reply = _Done(reply.answer, placed)
    for array, place in zip(arrays, placed, strict=True):
        _write(fd, array.reshape(-1).view(np.uint8).data, place.offset)
    head = msgspec.msgpack.encode(reply)
    _write(fd, memoryview(head), _LENGTH.size)
    _write(fd, memoryview(_LENGTH.pack(len(head))), 0)

"""Runs one job on a stranger's file in a child process of its own, with bounds on what it may use.

    result = await sandbox.run("module:function", job, data)

The child is forked from the process that image workers are forked from, which has the libraries
loaded. It gets the file in an anonymous file, and gives its arrays back in another one. While it
works it can open neither files nor sockets, and has limits for its time and memory. Nothing is
pickled by the child: one that a hostile file took over can return wrong numbers, not code.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import importlib
import math
import mmap
import multiprocessing
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from server.errors import SaccadeError, ServerBusy
from server.workers.process import mapped_bytes, start_child
from server.workers.shared_memory import ALIGNMENT

# How long a child may take to be forked and to load what is not loaded yet.
_START_TIMEOUT_S = 120.0
# One write to a file moves at most this much.
_WRITE_BYTES = 1 << 30
_LENGTH = struct.Struct("<Q")
_M_ARENA_MAX = -8
# Threads of a decoder, as FFmpeg bounds them.
_MAX_THREADS = 16


@dataclass(frozen=True)
class SandboxLimits:
    """`processes` run at a time and `queue` more jobs wait; a job may take `timeout_s` seconds, and
    `max_memory_bytes` beyond what a process that does nothing has."""

    processes: int
    queue: int
    timeout_s: float
    max_memory_bytes: int


@dataclass(frozen=True)
class Output:
    """What a job gives: arrays of uint8 or float32, and `answer`, bytes of the job's own."""

    answer: bytes
    arrays: list[npt.NDArray[Any]] = field(default_factory=list)


# Prepares for a job, which is the job's own bytes: imports what it needs and opens what it reads.
# What it returns is called with the file when nothing can be opened any more.
Prepare: TypeAlias = Callable[[bytes], Callable[[bytes], Output]]


class JobTimedOut(Exception):
    """The job took longer than its limit, and its process was killed."""


class JobDied(Exception):
    """The process died on the job, or gave something that is not an answer."""


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


class _Call(msgspec.Struct, frozen=True):
    """What the child is told: `prepare` is the "module:function" that prepares for `job`."""

    prepare: str
    job: bytes
    timeout_s: float
    max_memory_bytes: int


class Sandbox:
    """Runs jobs in processes of their own. `close` ends it."""

    def __init__(self, limits: SandboxLimits) -> None:
        self.limits = limits
        self._slots = asyncio.Semaphore(limits.processes)
        self._waiting = 0
        self._threads = ThreadPoolExecutor(limits.processes, "sandbox")

    def close(self) -> None:
        """Take no more jobs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, prepare: str, job: bytes, data: bytes) -> Output:
        """Run the job "module:function" on the file `data`; see `Prepare`.

        A caller that is cancelled takes the process along.

        Raises:
            ServerBusy: too many jobs wait, or no process can be started.
            JobRefused, JobTimedOut, JobDied
        """
        if self._waiting >= self.limits.queue:
            raise ServerBusy(f"{self._waiting} videos wait to be decoded, which is the limit")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        call = _Call(prepare, job, self.limits.timeout_s, self.limits.max_memory_bytes)
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, _run, call, data, theirs)
        work.add_done_callback(self._free)
        with ours:  # its end tells the thread that nobody waits any more
            return await asyncio.shield(work)

    def _free(self, work: asyncio.Future[Output]) -> None:
        self._slots.release()
        if not work.cancelled():
            work.exception()  # the caller may have left: do not warn about it


# ---------------------------------------------------------------------- in a thread of the server


def _run(call: _Call, data: bytes, caller: socket.socket) -> Output:
    """Run one child from start to end; `caller` becomes readable when nobody waits any more."""
    with caller, _memfd() as source, _memfd() as result:
        _write(source.fileno(), memoryview(data), 0)
        ready, child_ready = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("forkserver").Process(
            target=_main, args=(call, source, result, child_ready), daemon=True
        )
        with ready, child_ready:
            _start(process)
            try:
                _await(process, ready, caller, call.timeout_s)
            finally:
                if process.exitcode is None:
                    process.kill()
                process.join()
        status = process.exitcode
        process.close()
        output = _read(result.fileno())
        if output is not None:
            return output
        if status == -signal.SIGXCPU:
            raise JobTimedOut
        raise JobDied(f"the process ended with status {status}")


def _start(process: BaseProcess) -> None:
    try:
        process.start()
    except (OSError, EOFError) as error:  # the forking process died: the next start renews it
        raise ServerBusy("no process for decoding videos could be started") from error


def _await(
    process: BaseProcess, ready: Connection, caller: socket.socket, timeout_s: float
) -> None:
    """Wait for the end of the child. Its time begins when it has loaded what it needs."""
    if ready in wait([ready, process.sentinel, caller], _START_TIMEOUT_S):
        ended = wait([process.sentinel, caller], timeout_s)
        if not ended:
            raise JobTimedOut
        if process.sentinel not in ended:
            raise JobDied("nobody waits for the job any more")


def _read(fd: int) -> Output | None:
    """The result of a child that has ended; None if it ended before it had one.

    Raises:
        JobRefused, JobDied
    """
    # A child that handed its descriptor on could cut the file off under our mapping.
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
        reply = msgspec.msgpack.decode(head, type=_Done | _Failed)
        if isinstance(reply, _Failed):
            raise JobRefused(reply.code, reply.message)
        return Output(reply.answer, [_array(memory, each) for each in reply.arrays])
    except (ValueError, struct.error, msgspec.MsgspecError):
        raise JobDied("the result is damaged") from None


def _array(memory: mmap.mmap, placed: _Placed) -> npt.NDArray[Any]:
    """Raises ValueError if the array is not inside the memory."""
    if min(placed.shape, default=0) < 0:
        raise ValueError
    count = math.prod(placed.shape)
    if count == 0:
        return np.empty(placed.shape, placed.dtype)
    return np.frombuffer(memory, placed.dtype, count, placed.offset).reshape(placed.shape)


@contextlib.contextmanager
def _memfd() -> Iterator[Connection]:
    """An anonymous file, as an object that can be handed to a child: `fileno` is its descriptor."""
    fd = os.memfd_create("saccade-clip", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with Connection(fd) as file:
        yield file


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # a write releases the GIL, unlike a copy into a mapping
        done += os.pwrite(fd, data[done : done + _WRITE_BYTES], offset + done)


# ---------------------------------------------------------------------- in the child


def _main(call: _Call, source: Connection, result: Connection, ready: Connection) -> None:
    """Entry point of the child process."""
    start_child("SACCADE::VideoDecoder")
    module, _, name = call.prepare.partition(":")
    prepare: Prepare = getattr(importlib.import_module(module), name)
    reply: _Done | _Failed
    arrays: list[npt.NDArray[Any]] = []
    try:
        work = prepare(call.job)
        ready.send_bytes(b"ready")
        data = _contents(source.fileno())
        _confine(call)
        output = work(data)
        arrays = [np.ascontiguousarray(array) for array in output.arrays]
        reply = _Done(output.answer, [])
    except SaccadeError as error:
        reply = _Failed(error.code, error.message)
    _put(result.fileno(), reply, arrays)


def _contents(fd: int) -> bytes:
    if os.fstat(fd).st_size == 0:
        return b""
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as file:
        return file[:]


def _confine(call: _Call) -> None:
    """Set the limits of this process; they cannot be raised again."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, 1)  # each arena of a thread reserves 64 MiB of addresses
    cores = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    seconds = math.ceil(call.timeout_s * cores) + 1
    _limit(resource.RLIMIT_AS, mapped_bytes() + call.max_memory_bytes)
    _limit(resource.RLIMIT_FSIZE, call.max_memory_bytes)
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 0)  # what is open stays open; nothing else can be opened


def _limit(which: int, value: int) -> None:
    """Lower a limit to `value`, or leave it if it is lower."""
    _, hard = resource.getrlimit(which)
    if hard == resource.RLIM_INFINITY or hard > value:
        resource.setrlimit(which, (value, value))


def _put(fd: int, reply: _Done | _Failed, arrays: list[npt.NDArray[Any]]) -> None:
    """Write the result: the length of the head, the head, and the arrays behind it. The length
    is written last: without it there is no result."""
    placed: list[_Placed] = []
    if isinstance(reply, _Done):
        # The head grows with the number of arrays, which is small, and with the answer.
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

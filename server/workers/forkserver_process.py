"""The forkserver: a process that has everything loaded, and forks a worker when the server asks.

It is executed with the environment of `environment.without_secrets`, or forked from a process that
has no secret (`template`): neither its memory nor that of the workers ever contains a key. The
server sends a `Fork` with descriptors over a socket and gets a `Forked` with two: a pipe that
carries the exit status, and a pidfd if the system has them. The forkserver ends when the server
closes the socket.
"""

import contextlib
import errno
import importlib
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeAlias

import msgspec

from server.telemetry.log import bounded
from server.workers import preload
from server.workers.process import die_with_parent
from server.workers.worker import WorkerSpec

log = logging.getLogger("saccade.images")

MAX_MESSAGE_BYTES = 4096
MAX_FDS = 4
STATUS = struct.Struct("<i")
# Most text that the log takes from workers in each period, in bytes and seconds.
_OUTPUT_BYTES, _OUTPUT_PERIOD_S = 8192, 10.0
_STDIN, _STDERR = 0, 2

# What a forked process runs: it owns the descriptors that came with its `Fork`.
Target: TypeAlias = Callable[[list[int]], None]


class Fork(msgspec.Struct, frozen=True):
    """Fork a process that calls `target`, the "module:function" of a `Target`, with the descriptors
    that come with this message."""

    target: str


class Forked(msgspec.Struct, frozen=True):
    """The answer to `Fork`: a process id, or the `errno` for which there is none."""

    pid: int
    errno: int = 0


encoder = msgspec.msgpack.Encoder()
fork_decoder = msgspec.msgpack.Decoder(Fork)
forked_decoder = msgspec.msgpack.Decoder(Forked)


def main(control: int) -> None:
    """Entry point of the executed process. The spec is on standard input."""
    with open(_STDIN, "rb", closefd=False) as file:
        spec = msgspec.msgpack.decode(file.read(), type=WorkerSpec | None)
    serve(control, spec)


def serve(control: int, spec: WorkerSpec | None) -> None:
    """Load `spec`, and fork processes until the other end of `control` is closed."""
    if spec is not None:
        preload.load(spec)
    run(socket.socket(fileno=control))


def run(control: socket.socket) -> None:
    """Fork processes until the other end of `control` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _Forkserver(control).run()


class _Forkserver:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        # The pipes for the exit statuses of running processes, by process id.
        self._statuses: dict[int, int] = {}
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        self._wakeup_writer = wakeup
        self._output = _Output()
        self._null = os.open(os.devnull, os.O_RDWR)

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the default would not wake us
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        poll = select.poll()
        for source in (self._control, self._wakeup, self._output):
            poll.register(source, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._output.fileno() in ready:
                self._output.read()
            if self._wakeup.fileno() in ready:
                self._reap()
            if self._control.fileno() in ready and not self._serve():
                return

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)
        while self._statuses:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            pipe = self._statuses.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # the server does not want to know
                os.write(pipe, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipe)

    def _serve(self) -> bool:
        """Answer one request; returns False if there are no more."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, MAX_FDS)
        except ConnectionError:
            return False
        if not data:
            return False
        try:
            self._fork(fork_decoder.decode(data), fds)
        except ConnectionError:  # the server has left
            return False
        except OSError as error:  # no memory, or too many processes or files
            failed = Forked(0, error.errno or errno.EAGAIN)
            self._control.send(encoder.encode(failed))
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, fork: Fork, fds: list[int]) -> None:
        reader, writer = os.pipe()
        parent = os.getpid()
        with os.fdopen(reader, "rb") as status:
            try:
                pid = os.fork()
            except OSError:
                os.close(writer)
                raise
            if pid == 0:
                self._become(fork, fds, parent)
            self._statuses[pid] = writer
            answer = [status.fileno()]
            with contextlib.ExitStack() as opened:
                # It is not reaped before it has a pidfd, so the id cannot be that of another.
                with contextlib.suppress(OSError):  # an old kernel, or a container without
                    answer.append(os.pidfd_open(pid))
                    opened.callback(os.close, answer[-1])
                socket.send_fds(self._control, [encoder.encode(Forked(pid))], answer)

    def _become(self, fork: Fork, fds: list[int], parent: int) -> NoReturn:
        """Run `fork` in the new process, a child of the process `parent`."""
        code = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._output.write_to(_STDERR)
            self._disconnect([*fds, _STDERR])
            module, _, name = fork.target.partition(":")
            target: Target = getattr(importlib.import_module(module), name)
            target(fds)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _disconnect(self, kept: list[int]) -> None:
        """Connect all descriptors but `kept` to nothing: ours, and those of libraries, such as
        connections to a model hub. They are not closed, because an object that still holds one
        would later close another that got its number."""
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd not in kept:
                with contextlib.suppress(OSError):  # the listing's own is closed by now
                    os.fstat(fd)
                    os.dup2(self._null, fd)


class _Output:
    """What workers write to standard error, as lines of the log.

    They get a pipe instead of the server's standard error, which may be a terminal that takes
    commands, or a file that could be truncated. The log takes a limited amount.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._left = _OUTPUT_BYTES
        self._period = 0

    def fileno(self) -> int:
        return self._reader

    def write_to(self, fd: int) -> None:
        """In a forked process: make `fd` a writing end."""
        os.dup2(self._writer, fd)

    def read(self) -> None:
        """Log what there is to read."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._reader, 1 << 16)
            period = int(time.monotonic() / _OUTPUT_PERIOD_S)
            if period != self._period:
                self._period, self._left = period, _OUTPUT_BYTES
            taken, self._left = data[: self._left], max(0, self._left - len(data))
            for line in taken.decode(errors="replace").splitlines():
                log.warning("output of an image worker: %s", bounded(line, _OUTPUT_BYTES))

"""The server's side of the forkserver: starts it, and starts worker processes through it."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec

from server.workers import environment, template
from server.workers.confinement import SandboxMode
from server.workers.forked_process import ForkedProcess
from server.workers.forkserver_process import (
    MAX_FDS,
    MAX_MESSAGE_BYTES,
    Fork,
    Forked,
    encoder,
    forked_decoder,
)
from server.workers.template import TemplateFork
from server.workers.worker import WorkerSpec

# A forkserver answers its first request when it has loaded the libraries. Later answers take some
# milliseconds; one that hangs is killed, and its children end with it.
_LOAD_TIMEOUT_S, _FORK_TIMEOUT_S = 600.0, 30.0
_WORKER = "server.workers.worker:main"
# Runs `forkserver_process.main` with the import path of the server.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; "
    "from server.workers.forkserver_process import main; main({control})"
)


class ForkserverLost(Exception):
    """The forkserver has died or hangs, so no process can be started now."""


class WorkerProcess(ForkedProcess):
    """A running image worker; `connection` is the server's end of its socket."""

    def __init__(self, process: ForkedProcess, connection: socket.socket) -> None:
        super().__init__(process.pid, process.sentinel, process._pidfd)
        self.connection = connection

    def _close(self) -> None:
        super()._close()
        self.connection.close()


class Forkserver:
    """Starts processes, with the libraries and the extractor of `spec` loaded; without a spec, they
    load what they need."""

    def __init__(self, spec: WorkerSpec | None) -> None:
        self._spec = spec
        self._process: subprocess.Popen[bytes] | TemplateFork | None = None
        self._control: socket.socket | None = None
        self._has_answered = False
        # Held while a process is started; the forkserver starts one after the other anyway.
        self._starting = threading.Lock()
        self._is_closed = False

    @property
    def sandbox_mode(self) -> SandboxMode:
        """How the processes confine themselves."""
        return "auto" if self._spec is None else self._spec.sandbox

    def preload(self) -> None:
        """Start the forkserver, which begins to load the extractor.

        Call it from a thread that lives as long as the server: the forkserver ends with the thread
        that started it.
        """
        with self._starting:
            self._ensure_running()

    def start(self) -> WorkerProcess:
        """Start an image worker. Blocks. Raises: as `fork`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                return WorkerProcess(self.fork(_WORKER, [theirs.fileno()]), ours)
            except BaseException:
                ours.close()  # a worker that did start exits
                raise

    def fork(self, target: str, fds: Sequence[int]) -> ForkedProcess:
        """Start a process that calls `target`, "module:function", with copies of `fds`. Blocks.

        If the forkserver has died or hangs, another one is started, unless it was still loading.

        Raises:
            ForkserverLost: a forkserver has died while it loaded, two have died or hang, or the
                server is shutting down.
            OSError: the process cannot be started.
        """
        with self._starting:
            try:
                forked, received = self._ask(target, fds)
            except ForkserverLost:
                was_loaded = self._has_answered
                self._end()
                if not was_loaded:  # it died while it loaded, as the next one would
                    raise
                forked, received = self._ask(target, fds)
        if not received:
            raise OSError(forked.errno, os.strerror(forked.errno))
        status, *pidfd = received
        return ForkedProcess(forked.pid, status, pidfd[0] if pidfd else None)

    def _ask(self, target: str, fds: Sequence[int]) -> tuple[Forked, list[int]]:
        """Ask the forkserver for a process; returns its answer and the descriptors in it."""
        control = self._ensure_running()
        control.settimeout(_FORK_TIMEOUT_S if self._has_answered else _LOAD_TIMEOUT_S)
        try:
            socket.send_fds(control, [encoder.encode(Fork(target))], fds)
            data, received, _, _ = socket.recv_fds(
                control, MAX_MESSAGE_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except (ConnectionError, TimeoutError) as error:
            raise ForkserverLost(f"the forkserver of the image workers is lost: {error}") from None
        if not data:
            raise ForkserverLost("the forkserver of the image workers has died")
        self._has_answered = True
        return forked_decoder.decode(data), received

    def _ensure_running(self) -> socket.socket:
        if self._is_closed:
            raise ForkserverLost("the forkserver of the image workers has been stopped")
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        if self._control is None:
            self._has_answered = False
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = template.start(self._spec, theirs) or self._execute(theirs)
            if self._was_closed():  # meanwhile, so that `close` did not see this process
                self._process.kill()
        return self._control

    def _execute(self, control: socket.socket) -> "subprocess.Popen[bytes]":
        """Execute the forkserver, which gets the other end of the connection in `control`."""
        program = _PROGRAM.format(path=sys.path, control=control.fileno())
        with os.fdopen(os.memfd_create("saccade-worker-spec"), "w+b") as file:
            file.write(msgspec.msgpack.encode(self._spec))
            file.seek(0)
            return subprocess.Popen(  # noqa: S603 - no client chooses any of it
                [sys.executable, "-c", program],
                stdin=file,
                pass_fds=[control.fileno()],
                env=environment.without_secrets(os.environ),
            )

    def close(self) -> None:
        """Stop the forkserver and, with it, all remaining processes. Also ends a `fork` that waits
        for the forkserver, with an error."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._starting:
            self._end()

    def _was_closed(self) -> bool:
        return self._is_closed

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._forget()

    def _forget(self) -> None:
        process, self._process = self._process, None
        control, self._control = self._control, None
        if process is not None:
            process.wait()
        if control is not None:
            control.close()

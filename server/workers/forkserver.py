"""Starts worker processes by forking a process that has everything loaded (the forkserver)."""

import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from server.workers import preload
from server.workers.worker import WorkerSpec, main

_JOIN_TIMEOUT_S = 5.0


class WorkerProcess:
    """A running worker process; `connection` is the server's end of its socket."""

    def __init__(self, process: BaseProcess, connection: socket.socket) -> None:
        self.connection = connection
        self.pid = process.pid or -1
        self._process: BaseProcess | None = process  # None when it has ended
        self._lock = threading.Lock()
        self._pidfd = _pidfd(self.pid)

    def kill(self) -> None:
        """Kill the process at once. Does not block, and may be called from any thread."""
        with self._lock:
            if self._process is None:
                return
            with contextlib.suppress(ProcessLookupError):
                if self._pidfd is None:
                    self._process.kill()
                else:  # unlike a pid, never refers to a later process
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process, wait until it has exited and close the descriptors. Blocks."""
        self.kill()
        if (process := self._process) is not None:
            process.join(_JOIN_TIMEOUT_S)
        with self._lock:
            if self._process is None:
                return
            self._process = None  # closes its descriptor as well
            self.connection.close()
            if self._pidfd is not None:
                os.close(self._pidfd)


class Forkserver:
    """Forks workers for `spec`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._context = multiprocessing.get_context("forkserver")
        self._spec_file: Path | None = None

    def preload(self) -> None:
        """Start the forkserver, which begins to load the extractor.

        Call it from a thread that lives as long as the server: the forkserver ends with the thread
        that started it.
        """
        if self._spec_file is not None:
            return
        fd, name = tempfile.mkstemp(prefix="saccade-worker-")
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.msgpack.encode(self._spec))
        self._spec_file = Path(name)
        os.environ[preload.SPEC_VARIABLE] = name
        self._context.set_forkserver_preload(["server.workers.preload"])
        forkserver.ensure_running()

    def start(self, name: str) -> WorkerProcess:
        """Start a worker. Blocks.

        Raises OSError or EOFError if the forkserver has died; the next call starts a new one.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = self._context.Process(target=main, args=(theirs,), name=name, daemon=True)
            try:
                process.start()
                return WorkerProcess(process, ours)
            except BaseException:
                ours.close()  # a worker that did start exits
                raise

    def close(self) -> None:
        """Stop the forkserver and, with it, all remaining workers."""
        server: Any = forkserver._forkserver
        if (pid := server._forkserver_pid) is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                server._stop()
        if self._spec_file is not None:
            self._spec_file.unlink(missing_ok=True)
            self._spec_file = None
            os.environ.pop(preload.SPEC_VARIABLE, None)


def _pidfd(pid: int) -> int | None:
    """A pidfd of the process; None if the kernel or a container's seccomp profile has none."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None

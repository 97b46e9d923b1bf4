"""Where image workers come from: a process that has everything loaded, of which they are forks."""

import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from server.workers import preload
from server.workers.worker import WorkerSpec, main


class Nursery:
    """Starts workers for `spec`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._context = multiprocessing.get_context("forkserver")
        self._spec_file: Path | None = None

    def preload(self) -> None:
        """Start the process that workers are forked from; it loads the extractor meanwhile.

        Call it from a thread that lives as long as the server, since that process ends with it.
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

    def start(self, name: str) -> tuple[BaseProcess, socket.socket]:
        """Start a worker; returns it with our end of its socket. Blocks.

        Raises OSError or EOFError if the process that workers are forked from has died; the next
        start renews it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = self._context.Process(target=main, args=(theirs,), name=name, daemon=True)
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        return process, ours

    def close(self) -> None:
        """End the process that workers are forked from, and with it any worker left."""
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

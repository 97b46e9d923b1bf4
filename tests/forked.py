"""Forkservers that several tests share, and forks of the test process, which have what it has
imported: a forkserver, and one that runs a function.

A new process would spend more than ten seconds of one core on imports of vLLM.
"""

import os
import pickle
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, cast

from server.workers.forkserver import Forkserver
from server.workers.forkserver_process import run


class SharedForkserver(Forkserver):
    """Outlives the pools that use it, because a forkserver takes a second to load libraries."""

    def close(self) -> None:
        """Ignore the `close` of each pool."""

    def stop(self) -> None:
        super().close()


class ImportedForkserver(Forkserver):
    """Call `preload` before this process starts threads: they would not exist in the fork."""

    def __init__(self) -> None:
        super().__init__(None)

    def _execute(self, control: socket.socket) -> "subprocess.Popen[bytes]":
        pid = os.fork()
        if pid == 0:
            self._serve(control)
        return cast(Any, Fork(pid))

    def _serve(self, control: socket.socket) -> NoReturn:
        try:
            assert self._control is not None
            self._control.close()
            run(control)
        finally:
            os._exit(0)


class Fork:
    """A child of this process: the part of `Popen` that `Forkserver` uses."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = False

    def poll(self) -> int | None:
        self._is_over = self._is_over or os.waitpid(self._pid, os.WNOHANG)[0] != 0
        return 0 if self._is_over else None

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        if not self._is_over:
            os.waitpid(self._pid, 0)
            self._is_over = True


FORKSERVER = ImportedForkserver()


def in_fork(work: Callable[[], Any]) -> Any:
    """The result of `work` in a fork of this process."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with os.fdopen(writer, "wb") as file:
                file.write(pickle.dumps(work()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        result = file.read()
    os.waitpid(pid, 0)
    return pickle.loads(result)  # noqa: S301 - written by the fork

"""A process that was forked for the server by another one, as the server sees it."""

import contextlib
import os
import select
import signal
import threading

from server.workers.forkserver_process import STATUS

_JOIN_TIMEOUT_S = 5.0
# A process closes its socket some milliseconds before it is over.
_EXIT_TIMEOUT_S = 1.0


class ForkedProcess:
    """A process that the forkserver or the template has forked. Call `end` at last."""

    def __init__(self, pid: int, status: int, pidfd: int | None = None) -> None:
        """`status` is the descriptor of the pipe that carries the exit status, or only ends."""
        self.pid = pid
        self.sentinel = status
        """Readable when the process has ended, or the forkserver."""
        self._pidfd = pidfd
        self._exit_code: int | None = None
        self.is_over = False
        """Whether it is known to have ended."""
        # Held while a descriptor is used to kill, so that it is not closed meanwhile.
        self._lock = threading.Lock()
        self._is_closed = False

    def exit_code(self, timeout_s: float = _EXIT_TIMEOUT_S) -> int | None:
        """The exit status of a process that ends, negative for a signal; None if it is unknown: it
        goes on, or the forkserver that would report it is over. Blocks."""
        if not self.is_over and not self._is_closed and _is_readable(self.sentinel, timeout_s):
            if status := os.read(self.sentinel, STATUS.size):
                (self._exit_code,) = STATUS.unpack(status)
            self.is_over = True
        return self._exit_code

    def kill(self) -> None:
        """Kill the process at once. Does not block, and may be called from any thread."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._is_closed:
                return
            if self._pidfd is not None:  # unlike a pid, never refers to a later process
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            elif not self.is_over:
                os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process, wait until it has exited and close the descriptors. Blocks."""
        self.exit_code(0)
        self.kill()
        self.exit_code(_JOIN_TIMEOUT_S)
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._close()

    def _close(self) -> None:
        os.close(self.sentinel)
        if self._pidfd is not None:
            os.close(self._pidfd)


def _is_readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))

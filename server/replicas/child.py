"""A program that this process has started and watches."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence

from server.workers.process import die_with_parent


class Child:
    """Runs until it ends by itself, or gets a signal. It ends with this process."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        files: Collection[int] = (),
        cores: Collection[int] = (),
    ) -> None:
        """`files` are those that it inherits, beside the standard ones; `cores` are those that it
        may use, or none for all.

        Raises:
            OSError: it cannot be started, as when there are too many processes or open files.
        """
        parent = os.getpid()

        def prepare() -> None:
            die_with_parent(parent)
            if cores:
                os.sched_setaffinity(0, cores)

        # In a group of its own: a terminal's SIGINT is for this process, which decides.
        self._process = subprocess.Popen(  # noqa: S603 - no client chooses any of it
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(files),
            preexec_fn=prepare,
            process_group=0,
        )
        try:
            self._file = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._file, self._note_end)

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._file)
        os.close(self._file)
        self._ended.set_result(self._process.wait())

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    @property
    def status(self) -> int | None:
        """As `ended` returns it; None if it has not ended."""
        return self._ended.result() if self._ended.done() else None

    async def ended(self) -> int:
        """Wait for its end; the exit status, or minus the number of the signal that ended it."""
        return await asyncio.shield(self._ended)

    async def ends_within(self, seconds: float) -> bool:
        await asyncio.wait([self._ended], timeout=seconds)
        return self.has_ended

    def send(self, number: int) -> None:
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it; for use without the event loop, too."""
        if not self.has_ended:
            self.send(signal.SIGKILL)
            self._process.wait()


def how(status: int) -> str:
    """An exit status in words."""
    return f"status {status}" if status >= 0 else f"signal {-status}"

"""Ends a worker whose job takes too much processor time or memory.

PDFium parses and draws nested forms in one call: its pauses for progressive rendering lie between
the outermost objects of a page, and none lie in parsing. So only the end of the process stops it.
A thread watches the job, because PDFium runs without the GIL. The pool replaces the worker in about
25 ms and does not count it as a death.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.workers.memory import private_bytes

# A job can touch about 100 MB between two checks.
_POLL_S = 0.05


@dataclass(frozen=True)
class WorkLimit:
    """Limits of one job: `cpu_s` seconds of processor time, and `memory_bytes` beyond the memory
    of the process at the start of the job."""

    cpu_s: float
    memory_bytes: int

    @contextmanager
    def enforced(self, report: Callable[[], None]) -> Iterator[None]:
        """While the body runs, end this process if the body exceeds a limit. `report` is called
        first, in another thread."""
        watch = _Watch(self, report)
        thread = threading.Thread(target=watch.run, name="work-limit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            watch.finish()
            thread.join()


class _Watch:
    def __init__(self, limit: WorkLimit, report: Callable[[], None]) -> None:
        self._cpu_end = time.process_time() + limit.cpu_s
        self._memory_end = private_bytes() + limit.memory_bytes
        self._report = report
        self._finished = threading.Event()
        # Held while the job's one reply is chosen: its result, or the report.
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self._finished.wait(_POLL_S):
            if time.process_time() > self._cpu_end or private_bytes() > self._memory_end:
                self._end()

    def _end(self) -> None:
        with self._lock:
            if self._finished.is_set():
                return
            try:
                self._report()
            finally:
                os._exit(0)

    def finish(self) -> None:
        with self._lock:
            self._finished.set()

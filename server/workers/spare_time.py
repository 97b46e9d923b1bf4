"""Runs the steps of a job in the time of the processors that no other process wants.

A process in Linux's class SCHED_IDLE gives its core at once to any other that wakes, and a process
that wakes takes such a core for a free one. A nice value does neither: the other waits for a slice.
Where all cores are always busy the class gets next to nothing, and without privileges a thread
cannot leave it. So a second thread is in it, and steps run there only while the job gets on.
"""

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# The least share of a core, of the time since the job began, with which it gets on.
_MIN_SHARE = 1 / 3


class SpareTime:
    """Runs the steps of one job, which uses this process alone. The other thread starts with the
    first step, and is confined as the thread from which that comes. If not `allowed`, no step runs
    there."""

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self._began = time.monotonic()
        self._used = time.process_time()
        self._thread: ThreadPoolExecutor | None = None
        self._has_begun = False

    def run(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`step(*args, **kwargs)`, which should take some hundredths of a second at most. It runs
        at this thread's own priority if the job gets less than a third of a core."""
        if not self._has_begun:
            self._begin()
        if self._thread is None or not self._gets_on():
            return step(*args, **kwargs)
        return self._thread.submit(step, *args, **kwargs).result()

    def _gets_on(self) -> bool:
        used = time.process_time() - self._used
        return used > _MIN_SHARE * (time.monotonic() - self._began)

    def _begin(self) -> None:
        """Start the thread before the job fills its memory: later, its stack may find no room."""
        self._has_begun = True
        if not self.allowed:
            return
        thread = ThreadPoolExecutor(1, "SpareTime", _use_spare_time)
        with contextlib.suppress(RuntimeError):  # there is none now
            thread.submit(_nothing)
            self._thread = thread


def _nothing() -> None:
    pass


def _use_spare_time() -> None:
    with contextlib.suppress(OSError):  # the container's runtime refuses it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

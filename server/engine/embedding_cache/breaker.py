"""Stops asking what does not answer, and tries again after a while."""

import threading
import time
from collections.abc import Callable

FAILURES_IN_A_ROW = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Breaker:
    """Opens after failures in a row. While it is open nothing may be tried; when its pause is over,
    one trial may, which closes it or doubles the pause. What had begun before it opened does not
    count then if it fails. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0
        self._until = 0.0
        self._on_trial = False

    @property
    def is_open(self) -> bool:
        return self._pause_s > 0

    @property
    def may_try(self) -> bool:
        """Whether `allows` would say yes."""
        return not self._pause_s or self._clock() >= self._until

    def allows(self) -> bool:
        """Whether to try now. Where it is open, who gets True is the one who tries."""
        with self._lock:
            if not self._pause_s:
                return True
            if self._clock() < self._until:
                return False
            self._until = self._clock() + self._pause_s  # nobody else until this one is done
            self._on_trial = True
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0
            self._pause_s = 0.0
            self._on_trial = False

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures < FAILURES_IN_A_ROW or (self._pause_s and not self._on_trial):
                return
            self._on_trial = False
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s or FIRST_PAUSE_S)
            self._until = self._clock() + self._pause_s

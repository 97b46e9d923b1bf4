"""Starts an engine again that has died, a bounded number of times."""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from server.errors import Unavailable
from server.telemetry import metrics

log = logging.getLogger("saccade.engine")

MESSAGE = "the engine has died, and is being started again"
_MAX_RETRY_AFTER_S = 60
# What a client is told to wait, in seconds, while no restart has been measured, and if one takes
# longer than the last.
_UNKNOWN_S, _OVERDUE_S = 30.0, 5.0


class Restarts:
    """How often the engine was started again, and whether it is being started.

    Attributes:
        given_up: the engine has died too often, or does not start.
    """

    def __init__(
        self,
        is_dead: Callable[[], bool],
        start: Callable[[], Awaitable[None]],
        most: int,
        within_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` starts the engine again, at most `most` times within `within_s` seconds."""
        self.given_up = False
        self._is_dead = is_dead
        self._start = start
        self._clock = clock
        self._within_s = within_s
        self._most = most
        self._began: deque[float] = deque(maxlen=most)
        self._starts_since: float | None = None  # None: it is not being started
        self._last_took_s = _UNKNOWN_S

    @property
    def under_way(self) -> bool:
        """Whether the engine is dead, but will be started again."""
        return not self.given_up and self._is_dead()

    def refusal(self) -> Unavailable | None:
        """The error for a new request; None if it may go on."""
        if not self.under_way:
            return None
        error = Unavailable(MESSAGE)
        left_s = self._last_took_s
        if self._starts_since is not None:
            left_s -= self._clock() - self._starts_since
        error.retry_after_s = round(min(_MAX_RETRY_AFTER_S, max(_OVERDUE_S, left_s)))
        return error

    async def again(self) -> bool:
        """Start the dead engine again, and once more if that fails; returns whether it runs. It
        does not when this happened too often."""
        while True:
            now = self._clock()
            if len(self._began) == self._most and now - self._began[0] < self._within_s:
                break
            self._began.append(now)
            self._starts_since = now
            metrics.engine_restarts.inc()
            log.error("the engine has died; starting it again")
            try:
                await self._start()
            except Exception:
                log.exception("failed to start the engine again")
                continue
            finally:
                self._starts_since = None
            self._last_took_s = self._clock() - now
            log.warning("the engine runs again, after %.1f s", self._last_took_s)
            return True
        self.given_up = True
        log.error("the engine was started again %d times within %g s", self._most, self._within_s)
        return False

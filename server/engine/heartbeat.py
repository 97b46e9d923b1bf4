"""Whether the engine moves: asks its loop for a sign of life, again and again.

The engine answers between two steps. A step that computes or compiles something long delays the
answer, so only a long silence means that the engine hangs or was stopped.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from server.concurrency import cancel

log = logging.getLogger("saccade.engine")

_INTERVAL_S = 1.0
# A check that comes later than this means that this process has not run either.
_MOST_COUNTED_S = 2.0


class Heartbeat:
    """Asks with `ask` while the body of `async with` runs, and calls `on_stall` when the engine
    begins to be stalled."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[object]],
        timeout_s: float,
        on_stall: Callable[[], Awaitable[object]],
    ) -> None:
        """`timeout_s`: after so long a silence the engine counts as stalled."""
        self._ask = ask
        self._timeout_s = timeout_s
        self._on_stall = on_stall
        self._silent_s = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def stalled(self) -> bool:
        """Whether the engine has not answered for `timeout_s`."""
        return self._silent_s >= self._timeout_s

    async def __aenter__(self) -> "Heartbeat":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await cancel(self._task)

    async def _run(self) -> None:
        while True:
            answer = asyncio.ensure_future(self._ask())
            try:
                await self._wait_for(answer)
            finally:
                answer.cancel()
            await asyncio.sleep(_INTERVAL_S)

    async def _wait_for(self, answer: asyncio.Future[object]) -> None:
        """Count the silence until `answer` is there. An engine that is dead, or was given up,
        answers with an error; others notice that."""
        last = time.monotonic()
        while not (await asyncio.wait([answer], timeout=_INTERVAL_S))[0]:
            was_stalled, now = self.stalled, time.monotonic()
            self._silent_s += min(now - last, _MOST_COUNTED_S)
            last = now
            if self.stalled and not was_stalled:
                log.error("the engine has not answered for %g s", self._timeout_s)
                try:
                    await self._on_stall()
                except Exception:
                    log.exception("failed to end the requests of the engine")
        is_dead = answer.exception() is not None  # read it: else asyncio warns
        if self.stalled and not is_dead:
            log.warning("the engine answers again")
        self._silent_s = 0.0

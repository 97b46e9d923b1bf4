"""Bounds the bytes of request bodies that the whole server holds at the same time.

A body takes its share before it is read, so a client whose body has no place is not read from, and
its socket pushes back. Small bodies take no share: the limit on connections bounds them. What was
let in by its head counts from then on (`Expected`), since it may begin only after hundreds of other
heads.

A body may wait for its share, unless as many bytes wait already as there are, or it would wait too
long at the rate at which bytes became free lately. Then its request is refused at once. While the
rate is not known, only a quarter as many may wait, or one body.

Bodies of batches take a quarter of the bytes at most, or one body, and none while others wait.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from server.concurrency import Turns
from server.errors import BodyMemoryFull
from server.request.admission import Rate, whole_seconds
from server.telemetry import metrics

# The rate is measured over this many shares.
_MEASURED = 16
# A body that may wait is refused only after so many times the longest time for which one should:
# its client has been patient, and the rate may have changed.
_PATIENCE = 12
# So many connections with a large body are read from in each iteration of the event loop, some
# 256 KiB each: a flood of bodies must not keep other requests waiting.
_READ_AT_A_TIME = 4


class ByteBudget:
    """`total` bytes. Shares are given in the order in which they were asked for."""

    def __init__(self, total: int, wait_timeout_s: float) -> None:
        """`wait_timeout_s` is the longest time for which a body should wait for its share."""
        self.total = total
        self.turns = Turns(_READ_AT_A_TIME)
        """Large bodies are read from in turns."""
        self.held = 0
        self._in_background = 0
        self._wait_timeout_s = wait_timeout_s
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._waiting_bytes = 0
        self._expected_bytes = 0
        self._rate = Rate(_MEASURED)
        metrics.admission_limit.labels("body_bytes").set(total)
        metrics.admission_held.labels("body_bytes").set_function(lambda: self.held)

    @property
    def waiting(self) -> int:
        """How many bodies wait for their shares."""
        return len(self._waiting)

    def expect(self, nbytes: int) -> "Expected":
        """A body of `nbytes` will be taken, which was let in by its head."""
        self._expected_bytes += nbytes
        return Expected(self._end_expected, nbytes)

    def _end_expected(self, nbytes: int) -> None:
        self._expected_bytes -= nbytes

    async def take(self, nbytes: int, *, was_let_in: bool = False) -> None:
        """Take `nbytes`, which the caller must give back. If they `was_let_in`, they may wait.

        Raises:
            BodyMemoryFull: they did not become free in time, or would not.
        """
        if not self._waiting and self.held + nbytes <= self.total:
            self.held += nbytes
            return
        if not was_let_in and (full := self.refusal(nbytes)) is not None:
            raise full
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (nbytes, granted)
        self._waiting.append(entry)
        self._waiting_bytes += nbytes
        try:
            await asyncio.wait_for(asyncio.shield(granted), _PATIENCE * self._wait_timeout_s)
        except BaseException as error:
            if granted.done():  # granted at the last moment
                self.give_back(nbytes)
            else:
                self._waiting.remove(entry)
                self._waiting_bytes -= nbytes
                self._grant()  # those behind may fit
            if isinstance(error, TimeoutError):
                raise self._full(1.0) from None
            raise

    async def take_background(self, nbytes: int, *, was_let_in: bool = False) -> None:
        """As `take`, for the body of a request of a batch, which does not wait and has no head."""
        others = self._in_background
        if self._waiting or (others and others + nbytes > self.total // 4):
            raise self._full(1.0)
        if self.held + nbytes > self.total:
            raise self._full(1.0)
        self.held += nbytes
        self._in_background += nbytes

    def give_back_background(self, nbytes: int) -> None:
        """Give back what `take_background` took."""
        self._in_background -= nbytes
        self.give_back(nbytes)

    def refusal(self, nbytes: int) -> BodyMemoryFull | None:
        """The refusal of a body of `nbytes` that is not worth waiting: they would not become free
        in time."""
        needed = self.held + self._waiting_bytes + self._expected_bytes + nbytes - self.total
        if needed <= 0:
            return None
        rate = self._rate.per_second()
        late_s = needed / rate - self._wait_timeout_s if rate else 0.0
        most = self.total if rate else max(self.total // 4, nbytes)
        if late_s > 0 or needed > most:
            return self._full(max(1.0, late_s))
        return None

    def _full(self, seconds: float) -> BodyMemoryFull:
        error = BodyMemoryFull(
            f"the bodies of other requests take {self.held} bytes, the limit is {self.total}, and "
            f"{self._waiting_bytes + self._expected_bytes} bytes wait; try again later"
        )
        error.retry_after_s = whole_seconds(seconds)
        return error

    def give_back(self, nbytes: int) -> None:
        """Give back what `take` took."""
        self.held -= nbytes
        waited = bool(self._waiting)
        if waited:
            self._rate.note(nbytes)
        self._grant()
        if waited and not self._waiting:
            self._rate.pause()

    def _grant(self) -> None:
        while self._waiting and self.held + self._waiting[0][0] <= self.total:
            nbytes, granted = self._waiting.popleft()
            self._waiting_bytes -= nbytes
            self.held += nbytes
            granted.set_result(None)


class Expected:
    """What a body will take that was let in by its head, until `end`."""

    def __init__(self, on_end: Callable[[int], None], nbytes: int) -> None:
        self._on_end = on_end
        self._nbytes = nbytes

    def end(self) -> None:
        """The body takes its share, or will not come. Further calls do nothing."""
        self._on_end(self._nbytes)
        self._nbytes = 0


class Share:
    """What one body holds of the budget. Use it as a context manager: the share ends with it."""

    def __init__(self, budget: ByteBudget, *, background: bool = False) -> None:
        """`background`: it is the body of a request of a batch."""
        self._take = budget.take_background if background else budget.take
        self._give_back = budget.give_back_background if background else budget.give_back
        self._nbytes = 0

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_: object) -> None:
        if self._nbytes:
            self._give_back(self._nbytes)

    async def grow(self, nbytes: int, *, was_let_in: bool = False) -> None:
        """Hold at least `nbytes`; see `ByteBudget.take`.

        Raises:
            BodyMemoryFull: they did not become free in time, or would not.
        """
        if nbytes > self._nbytes:
            await self._take(nbytes - self._nbytes, was_let_in=was_let_in)
            self._nbytes = nbytes

    def shrink(self, nbytes: int) -> None:
        """Hold at most `nbytes`."""
        if nbytes < self._nbytes:
            self._give_back(self._nbytes - nbytes)
            self._nbytes = nbytes

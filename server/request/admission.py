"""Admission: which requests may work now, which wait, and which are refused.

    async with admission.permit(record, quotas, cost):
        ...  # media are fetched and decoded, the engine answers

A permit is taken when the media of a request are known, before anything is fetched or decoded. At
most `running` requests have one; the others wait in a queue that is fair among groups of keys. A
request is refused at once if its key is over a limit, if the queue is full, or if its turn would
come too late, by the measured rate. While a running request waits for a share of the budgets
(`server.request.budgets`), no other one begins.

Of the requests with a permit, at most `in_engine` are in the engine; the queue of the others is
fair as well. vLLM's own queue, which is not, stays short. While several groups of keys are active,
none takes more than `group_share` of both, so that a few requests do not share each step of the
engine with a flood.

Requests of batches work in the background: each gets a `Turn` first, in queues that are served only
while no other request waits, and then a permit with this turn, which is never refused for them.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.errors import (
    EngineQueueFull,
    SaccadeError,
    ServerBusy,
    TooManyAnswers,
    Unavailable,
)
from server.request.arrivals import Arrivals
from server.request.budgets import Budgets, Holdings, Resource
from server.request.limits import Quota, Usage, headers
from server.request.shared_usage import SharedUsages
from server.request.slots import Slots
from server.telemetry import metrics
from server.telemetry.record import Record

_MAX_RETRY_AFTER_S = 60
# The rate is measured over this many answers, or over twice the requests that run together.
_MEASURED = 64
# A request may wait if most requests would be answered before its deadline then. If its turn comes
# late all the same, it is given up only when few would be.
_MOST, _FEW = 0.9, 0.25
# Waiting may take this many times as long as predicted: the rate varies within seconds.
_WAIT_MARGIN = 1.5
# So long the engine gets no more of a group with its share, when the media of another are loaded.
_HEAD_START_S = 0.1
# Usages that would not be missed are looked for when there are this many.
_MOST_USAGES = 10_000
# A body that takes longer to arrive no longer counts as a request that waits.
_ARRIVAL_S = 5.0


@dataclass(frozen=True)
class AdmissionLimits:
    """Bounds of the whole server.

    Attributes:
        running: requests that work at the same time.
        waiting: requests that wait for a permit.
        wait_s: longest time that a request may have to wait, in seconds.
        in_engine: engine requests (prompts, or answers to the same prompt) in the engine.
        background: requests of batches that work at the same time: fewer than the engine serves at
            a time.
        totals: what all requests together may hold.
        engine_requests: engine requests that run or wait, here or in the engine; above it, a
            request is refused at once (`--max-num-queued-reqs`). None: no limit.
        group_share: the share of `running` and of `in_engine` that one group of keys takes at most
            while another is active.
    """

    running: int
    waiting: int
    wait_s: float
    in_engine: int
    background: int
    totals: Mapping[Resource, int]
    engine_requests: int | None = None
    group_share: float = 1.0


class Rate:
    """How much cost per second the server gets done while requests wait for it."""

    def __init__(self, measured: int) -> None:
        self._done: deque[tuple[float, float]] = deque(maxlen=max(2, measured))
        self._last: float | None = None

    def note(self, cost: float) -> None:
        """Note that a request of this cost ended while others waited."""
        self._done.append((time.monotonic(), cost))

    def pause(self) -> None:
        """Nobody waits any more: what ends from now on does not show what the server can do."""
        self._last = self.per_second()
        self._done.clear()

    @property
    def mean(self) -> float:
        """The mean cost of what ended lately; 1 if nothing did."""
        return sum(cost for _, cost in self._done) / len(self._done) if self._done else 1.0

    def per_second(self) -> float | None:
        """The rate; None if it is not known yet."""
        if len(self._done) < self._done.maxlen // 4:  # type: ignore[operator]
            return self._last
        seconds = time.monotonic() - self._done[0][0]
        return sum(cost for _, cost in self._done) / seconds if seconds > 0 else self._last


class ServiceTimes:
    """How long the last requests took from their permit to their end."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_MEASURED)

    def note(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def quantile(self, share: float) -> float:
        """The time within which this share of them ended, in seconds; 0 if little is known."""
        if len(self._seconds) < _MEASURED // 4:
            return 0.0
        return sorted(self._seconds)[int(share * len(self._seconds))]


class Admission:
    """Gives permits."""

    def __init__(
        self,
        limits: AdmissionLimits,
        engine_is_full: Callable[[], str | None] = lambda: None,
        shared: SharedUsages | None = None,
        engine_is_away: Callable[[], Unavailable | None] = lambda: None,
    ) -> None:
        """`engine_is_full` says why the engine takes no more requests; None if it does. `shared`:
        where other front ends count what keys use. `engine_is_away` is the error for all requests
        while there is no engine."""
        self.limits = limits
        self.budgets = Budgets(limits.totals, limits.wait_s, lambda: self.slots.advance())
        most = limits.background
        if limits.engine_requests is not None:
            most = min(most, limits.engine_requests // 2)
        share = limits.group_share
        self.slots = Slots(
            limits.running, lambda: self.budgets.is_short, share, most_background=most
        )
        self.engine_slots = Slots(
            limits.in_engine,
            group_share=share,
            head_start_s=_HEAD_START_S,
            most_background=most,
        )
        self.engine_requests = 0
        self._arrivals = Arrivals(_ARRIVAL_S)
        self._engine_is_full = engine_is_full
        self._engine_is_away = engine_is_away
        self._shared = shared
        self.service_times = ServiceTimes()
        self._rate = Rate(max(_MEASURED, 2 * limits.running))
        self._usages: dict[str, Usage] = {}
        metrics.requests_waiting.set_function(lambda: len(self.slots.queue))
        metrics.requests_running.set_function(lambda: self.slots.taken)

    def permit(
        self,
        record: Record,
        quotas: Sequence[Quota] = (),
        cost: float = 1.0,
        engine_requests: int = 1,
        turn: "Turn | None" = None,
        was_let_in: bool = False,
    ) -> "Permit":
        """A permit for a request, to be used with `async with`.

        `quotas` are those of its key. `cost` says how much work it is, compared with others, and
        `engine_requests` how many the engine will get for it. The tokens that `record` has at the
        end are charged to the quotas. With a `turn`, the request is one of a batch: it need not
        wait, and the quotas are charged but not held against it. `was_let_in`: `check` has let it
        wait, and it was `arriving` since.

        Raises:
            RateLimited: the key is over one of its limits.
            EngineQueueFull: the engine would refuse the request now.
            TooManyAnswers: the engine would always refuse the request.
            ServerBusy: the queue is full, or the request would wait too long.
            Unavailable: there is no engine now.
        """
        return Permit(self, record, quotas, cost, engine_requests, turn, was_let_in)

    def arriving(self, record: Record) -> contextlib.AbstractContextManager[None]:
        """The large body of a request is read during the block. For the next of its group, it
        counts as one that waits, for some seconds; it is not refused later because others were
        faster."""
        return self._arrivals.one(record.key_group or "")

    async def background_turn(self, group: str, quotas: Sequence[Quota] = ()) -> "Turn":
        """Wait until a request of a batch of `group` may begin: when no other request waits, and
        half of what `quotas` allow per minute is left for the other requests of the group. It
        counts for them from then on, but not as one that runs at the same time."""
        while (wait_s := self._half_full_in(quotas)) > 0:  # noqa: ASYNC110 - others use it meanwhile
            await asyncio.sleep(min(wait_s, _MAX_RETRY_AFTER_S))
        share = max((quota.limits.share for quota in quotas), default=1.0)
        await self.slots.take_background(group, share)
        for quota in quotas:
            self.usage(quota).begin(counts=False)
        return Turn(self)

    def _half_full_in(self, quotas: Sequence[Quota]) -> float:
        return max((self.usage(quota).half_full_in() for quota in quotas), default=0.0)

    def check(
        self,
        record: Record,
        quotas: Sequence[Quota],
        engine_requests: int = 1,
        *,
        was_let_in: bool = False,
    ) -> list[Usage]:
        """The usages of `quotas`, if a request could have a permit or wait for it. Raises as
        `permit`. It may be called as soon as the key is known, since nothing is counted."""
        usages = [self.usage(quota) for quota in quotas]
        try:
            for usage in usages:
                usage.check()
            self.check_engine(engine_requests)
            group = record.key_group or ""
            if not (was_let_in or self._has_room(group)):
                self._check_wait(group, record.deadline)
        except SaccadeError:
            record.headers += headers(usages)
            raise
        return usages

    def check_engine(self, requests: int) -> None:
        """Raises EngineQueueFull if the engine would refuse this many requests more,
        TooManyAnswers if it always would, and Unavailable if there is none."""
        if (away := self._engine_is_away()) is not None:
            raise away
        most = self.limits.engine_requests
        if most and requests > most:
            raise TooManyAnswers(
                f"the request is for {requests} answers, the limit is {most} at a time"
            )
        why = self._engine_is_full()
        if most is not None and self.engine_requests + requests > most:
            why = f"{self.engine_requests} requests run or wait in the engine, the limit is {most}"
        if why is not None:
            raise self._busy(why, 1.0, EngineQueueFull)

    def usage(self, quota: Quota) -> Usage:
        """What the key or group of `quota` has used. Its limits may have changed since."""
        found = self._usages.get(quota.name)
        if found is None:
            if len(self._usages) >= _MOST_USAGES:
                used = {name: each for name, each in self._usages.items() if not each.is_idle}
                self._usages = used
            cells = self._shared.cells(quota.name) if self._shared is not None else None
            found = self._usages[quota.name] = Usage(quota.limits, cells)
        elif found.limits != quota.limits:
            found.change(quota.limits)
        return found

    async def take_turn(
        self, group: str, share: float, cost: float, deadline: float | None
    ) -> None:
        """Wait until the request may run, and count it as running.

        Raises:
            ServerBusy: it has waited so long that few requests would be answered before its
                deadline.
            Unavailable: the engine has gone meanwhile.
        """
        if self.slots.take_now(group):
            return
        since = time.monotonic()
        try:
            await self.slots.take(group, share, cost)
        finally:
            metrics.admission_wait.observe(time.monotonic() - since)
        if (away := self._engine_is_away()) is not None:
            self.slots.free(group)
            if not self.slots.queue:
                self._rate.pause()
            raise away
        shortest_s = self.service_times.quantile(_FEW)
        if deadline is not None and time.monotonic() + shortest_s > deadline:
            self.end(cost, lambda: self.slots.free(group))
            raise self._busy("the request would not be answered before its deadline", 0.0)

    def _has_room(self, group: str) -> bool:
        free = self.limits.running - self.slots.taken
        return self._arrivals.count(group) < max(1, free) and self.slots.has_room(group)

    def _check_wait(self, group: str, deadline: float | None) -> None:
        rate, queue = self._rate.per_second(), self.slots.queue
        free = max(0, self.limits.running - self.slots.taken)
        arriving = max(0, self._arrivals.count(group) - free)  # that will have to wait
        if len(queue) + arriving >= self.limits.waiting:
            seconds = queue.cost / rate if rate else 1.0
            if (resource := self.budgets.short_of) is not None:
                full = self.budgets.error(resource)
                full.retry_after_s = whole_seconds(seconds)
                raise full
            waiting = len(queue) + arriving
            raise self._busy(f"{waiting} requests wait already, which is the limit", seconds)
        if not rate:
            return
        before = queue.cost_before(queue.start_of(group))
        wait_s = (before + arriving * self._rate.mean) / rate
        most_s = self.limits.wait_s
        if deadline is not None:
            longest_s = self.service_times.quantile(_MOST)
            most_s = min(most_s, (deadline - time.monotonic() - longest_s) / _WAIT_MARGIN)
        if wait_s > most_s:
            raise self._busy(
                f"the request would wait about {wait_s:.0f} s for its turn, and may wait "
                f"{max(0.0, most_s):.3g} s",
                wait_s - most_s,
            )

    @staticmethod
    def _busy(why: str, seconds: float, kind: type[ServerBusy] = ServerBusy) -> ServerBusy:
        error = kind(f"{why}; try again later")
        error.retry_after_s = whole_seconds(seconds)
        return error

    def end(self, cost: float, free: Callable[[], None]) -> None:
        """A request has ended, and `free` gives back its slot: the next one's turn."""
        waited = bool(self.slots.queue)
        if waited:
            self._rate.note(cost)
        free()
        if waited and not self.slots.queue:
            self._rate.pause()


class Turn:
    """The slot of one request of a batch, until it is released."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_released = False

    def release(self) -> None:
        """Give the slot back, unless that was done."""
        if not self._is_released:
            self._is_released = True
            self._admission.end(1.0, self._admission.slots.free_background)


class Permit:
    """The right of one request to work."""

    def __init__(
        self,
        admission: Admission,
        record: Record,
        quotas: Sequence[Quota],
        cost: float,
        engine_requests: int,
        turn: Turn | None = None,
        was_let_in: bool = False,
    ) -> None:
        self.holdings = Holdings(admission.budgets)
        self._engine_requests = engine_requests
        self._admission = admission
        self._record = record
        self._quotas = quotas
        self._cost = cost
        self._turn = turn
        self._was_let_in = was_let_in
        self._usages: list[Usage] = []
        self._share = max((quota.limits.share for quota in quotas), default=1.0)
        self._group = record.key_group or ""
        self._began = 0.0
        self._in_engine: set[str] = set()
        self._is_over = False

    async def __aenter__(self) -> "Permit":
        record = self._record
        if self._turn is None:
            usages = self._admission.check(
                record, self._quotas, self._engine_requests, was_let_in=self._was_let_in
            )
            for usage in usages:
                usage.begin()
        else:  # which has begun them
            self._admission.check_engine(self._engine_requests)
            usages = [self._admission.usage(quota) for quota in self._quotas]
        self._usages = usages
        record.headers += headers(usages)
        self._admission.engine_requests += self._engine_requests
        try:
            if self._turn is None:
                await self._admission.take_turn(
                    self._group, self._share, self._cost, record.deadline
                )
        except BaseException:
            self._end_usages()
            raise
        self._began = time.monotonic()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over = True
        self.holdings.close()
        self._end_usages()
        for request_id in list(self._in_engine):
            self.leave_engine(request_id)
        if kind is None and self._record.completion_tokens:
            self._admission.service_times.note(time.monotonic() - self._began)
        if self._turn is None:
            self._admission.end(self._cost, lambda: self._admission.slots.free(self._group))

    async def enter_engine(self, request_id: str) -> None:
        """Wait until the engine request may be sent. If others of the same client's request are in
        the engine already, as with `n` above 1, it may be sent at once; so may what is sent after
        the client has its answer, as with `background`."""
        if request_id in self._in_engine or self._has_ended():
            return
        slots = self._admission.engine_slots
        if self._turn is not None:
            if self._in_engine:
                slots.add_background()
            else:
                await slots.take_background(self._group, self._share)
        elif self._in_engine:
            slots.add(self._group)
        else:
            await slots.take(self._group, self._share)
        self._in_engine.add(request_id)
        if self._has_ended():  # nobody would leave for a request that is aborted from now on
            self.leave_engine(request_id)

    def is_loaded(self) -> None:
        """The media of the request are loaded, so it will enter the engine soon: the engine gets
        no more of a group that floods it."""
        if self._turn is None:
            self._admission.engine_slots.expect(self._group)

    def _has_ended(self) -> bool:
        return self._is_over

    def leave_engine(self, request_id: str) -> None:
        """The engine request has ended, or was not sent."""
        if request_id in self._in_engine:
            self._in_engine.remove(request_id)
            slots = self._admission.engine_slots
            slots.free(self._group) if self._turn is None else slots.free_background()

    def _end_usages(self) -> None:
        self._admission.engine_requests -= self._engine_requests
        record = self._record
        for usage in self._usages:
            usage.end(
                record.prompt_tokens + record.completion_tokens,
                record.image_tokens,
                counts=self._turn is None,
            )


def whole_seconds(seconds: float) -> int:
    """The value of a `Retry-After` for this time."""
    return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(seconds)))

"""Starts the replicas and haproxy, starts those again that end, and ends them."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from server.errors import CannotStart
from server.replica import Replica
from server.replicas.child import Child, how
from server.replicas.plan import Plan
from server.replicas.together import Together
from server.telemetry.service import notify

log = logging.getLogger("saccade")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_REQUESTS_CUT = 3
_POLL_S = 0.25
# As the liveness probes of `deploy/kubernetes`: a replica that hangs is killed.
_CHECK_S, _MOST_FAILED_CHECKS = 10.0, 6
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
# A process that has lived for so long is started again at once.
_LONG_S = 300.0
# Beyond the time that a replica gives its requests, until it is killed.
_SPARE_S = 15.0
_FLUSH_S = 1.0

Report = Callable[[str], None]


class Fleet:
    """All processes. `run` returns when they have ended."""

    def __init__(
        self,
        plan: Plan,
        replicas: Sequence[Replica],
        start_replica: Callable[[Replica], Child],
        start_proxy: Callable[[], Child],
        report: Report,
    ) -> None:
        self._plan = plan
        self._replicas = replicas
        self._start_replica = start_replica
        self._start_proxy = start_proxy
        self._report = report
        self._restarts = [0] * len(replicas)
        self._running: dict[int, Child] = {}
        self._ready: set[int] = set()
        self._proxy: Child | None = None
        self._has_begun = False
        self._together = Together(replicas, self._restarts.__getitem__)
        self._signals: asyncio.Queue[int] = asyncio.Queue()

    async def run(self, listening: socket.socket, invitation: str) -> int:
        """The exit status: 0, or 3 if requests were cut off.

        Raises:
            CannotStart: a process ended before all were ready.
            KeyboardInterrupt: so did a signal.
        """
        folder = self._replicas[0].folder
        try:
            with _signals(self._signals):
                try:
                    async with self._together.answering(folder / "together"):
                        return await self._serve(listening, invitation)
                finally:
                    await self._end_started()
        finally:
            for child in self._started_now():
                child.kill()

    def _started_now(self) -> list[Child]:
        children = [*self._running.values(), self._proxy]
        return [child for child in children if child is not None and not child.has_ended]

    async def _end_started(self) -> None:
        """End what runs after a start that has failed or was interrupted. Replicas remove their
        temporary files, unless another signal comes."""
        children = self._started_now()
        for child in children:
            child.send(signal.SIGTERM)
        if children:
            await self._unless_signalled(_have_ended(children, _SPARE_S))

    async def _serve(self, listening: socket.socket, invitation: str) -> int:
        keeping = [
            asyncio.create_task(self._keep_proxy()),
            *(asyncio.create_task(self._keep(each)) for each in self._replicas),
        ]
        try:
            await self._begin(keeping)
            self._report(invitation)
            notify("READY=1")
            number = await self._signals.get()
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.wait(keeping)
        return await self._end(number, listening)

    async def _begin(self, keeping: Sequence["asyncio.Task[None]"]) -> None:
        """Wait until all replicas are ready."""
        while len(self._ready) < len(self._replicas):
            await asyncio.wait(keeping, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in keeping:
                if task.done():
                    task.result()  # raises
            if not self._signals.empty():
                self._signals.get_nowait()
                raise KeyboardInterrupt
        self._has_begun = True

    # ------------------------------------------------------------------ keeping

    async def _keep(self, replica: Replica) -> None:
        """Start a replica, again and again."""
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            child = await self._started(replica.name, lambda: self._start_anew(replica))
            self._running[replica.index] = child
            watching = asyncio.create_task(self._watch(replica, child))
            try:
                status = await child.ended()
            finally:
                watching.cancel()
            self._ready.discard(replica.index)
            if not self._has_begun:
                raise CannotStart(f"{replica.name} has ended with {how(status)}")
            self._restarts[replica.index] += 1
            log.error("%s has ended with %s; starting it again", replica.name, how(status))
            pause_s = await _pause(began, pause_s)

    def _start_anew(self, replica: Replica) -> Child:
        replica.socket().unlink(missing_ok=True)
        return self._start_replica(replica)

    async def _started(self, name: str, start: Callable[[], Child]) -> Child:
        """What `start` starts, sooner or later."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return start()
            except OSError as error:
                if not self._has_begun:
                    raise CannotStart(f"{name} cannot be started: {error.strerror}") from None
                log.error("%s cannot be started: %s; trying again", name, error.strerror)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _watch(self, replica: Replica, child: Child) -> None:
        """Note when it is ready; kill it if it hangs after that."""
        while not await self._together.is_ready(replica):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(_POLL_S)
        self._ready.add(replica.index)
        failed = 0
        while failed < _MOST_FAILED_CHECKS:
            await asyncio.sleep(_CHECK_S)
            is_alive = await self._together.is_ready(replica, "/health")
            failed = 0 if is_alive else failed + 1
        log.error("%s is not healthy; killing it", replica.name)
        child.send(signal.SIGKILL)

    async def _keep_proxy(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            self._proxy = await self._started("haproxy", self._start_proxy)
            status = await self._proxy.ended()
            if not self._has_begun:
                raise CannotStart(f"haproxy has ended with {how(status)}")
            log.error("haproxy has ended with %s; starting it again", how(status))
            pause_s = await _pause(began, pause_s)

    # ------------------------------------------------------------------ the end

    async def _end(self, number: int, listening: socket.socket) -> int:
        """Let running requests finish, unless a second signal comes."""
        notify("STOPPING=1")
        self._together.drains = True
        assert self._proxy is not None
        if number == signal.SIGTERM:
            await self._unless_signalled(asyncio.sleep(self._plan.drain_delay_s))
        listening.close()
        self._proxy.send(signal.SIGUSR1)  # it listens no longer
        children = list(self._running.values())
        for child in children:
            child.send(signal.SIGTERM)
        limit_s = self._plan.drain_timeout_s + _SPARE_S
        await self._unless_signalled(_have_ended(children, limit_s))
        for child in children:
            child.send(signal.SIGTERM)  # the second one tells it not to wait
        is_cut = not await _have_ended(children, _SPARE_S)
        # It passes on what it has, but may also wait for more requests on a connection.
        await _have_ended([self._proxy], _FLUSH_S)
        return _REQUESTS_CUT if is_cut or _REQUESTS_CUT in _statuses(children) else 0

    async def _unless_signalled(self, work: Awaitable[object]) -> None:
        """Wait for `work`, or for a signal, which stays in the queue."""
        working = asyncio.ensure_future(work)
        signalled = asyncio.ensure_future(self._signals.get())
        await asyncio.wait([working, signalled], return_when=asyncio.FIRST_COMPLETED)
        if signalled.done():
            self._signals.put_nowait(signalled.result())
        for task in (working, signalled):
            task.cancel()


async def _have_ended(children: Sequence[Child], seconds: float) -> bool:
    """Wait until they have ended, but no longer."""
    return all(await asyncio.gather(*(child.ends_within(seconds) for child in children)))


def _statuses(children: Sequence[Child]) -> set[int | None]:
    return {child.status for child in children}


async def _pause(began: float, pause_s: float) -> float:
    """Wait before a process is started again, unless it has lived long; returns the next pause."""
    if time.monotonic() - began >= _LONG_S:
        return _FIRST_PAUSE_S
    await asyncio.sleep(pause_s)
    return min(2 * pause_s, _LONGEST_PAUSE_S)


@contextlib.contextmanager
def _signals(into: "asyncio.Queue[int]") -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, into.put_nowait, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

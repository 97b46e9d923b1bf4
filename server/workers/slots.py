"""Slots for image workers: each slot has one worker, which is replaced when it ends."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from server.telemetry import metrics
from server.telemetry.stages import ImageWork
from server.workers import protocol
from server.workers.channel import WorkerChannel
from server.workers.confinement import Confinement
from server.workers.forkserver import Forkserver, WorkerProcess
from server.workers.process import has_worked, out_of_memory_kills, processor_seconds
from server.workers.protocol import Features

log = logging.getLogger("saccade.images")

START_TIMEOUT_S = 120.0
# The pool is unhealthy after this many deaths in a row without a finished picture, until a picture
# is finished or no worker has died for `_CALM_S`.
_UNHEALTHY_DEATHS = 5
_CALM_S = 15.0
_SETTLE_S = 0.1
_RESTART_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 5.0)


@dataclass(eq=False, repr=False)  # Python's errors contain a `repr`, which would copy `data`
class Task:
    """An encoded job on one file, and the result that all its callers wait for.

    `group` is that of the first caller's API key. `pixels` are those of the picture by its header,
    0 where no picture is decoded. `sequence` is equal for frames of one animation,
    whose numbers are `frame`; None for others.
    """

    key: str
    data: bytes
    job: bytes
    result: asyncio.Future[Features]
    work: ImageWork
    group: str = ""
    pixels: int = 0
    sequence: int | None = None
    frame: int = 0
    waiters: int = 0
    attempts: int = 0


class Ending(StrEnum):
    """Why a worker ended: `CRASHED` and `TIMED_OUT` by its picture, `DIED` and `STALLED` by what
    happens to the machine."""

    DIED = "died"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    STALLED = "was stopped or got no processor"
    ABANDONED = "was stopped: all callers of its image have left"
    GAVE_UP = "ended itself: its page of a PDF took too much time or memory"


# Endings that say nothing about the health of the pool.
_HARMLESS = (Ending.ABANDONED, Ending.GAVE_UP)


@dataclass(eq=False)
class Slot:
    """The slot of one worker. `started` is when the start of the worker began, and `since` when the
    worker began `task`, both on `time.monotonic()`; `processor_s` is the processor time that it had
    taken until then; `later` are the tasks that it does afterwards. `timer` limits the duration of
    the start or of the task."""

    channel: WorkerChannel | None = None
    started: float = 0.0
    task: Task | None = None
    later: deque[Task] = field(default_factory=deque)
    since: float = 0.0
    processor_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    ending: Ending = Ending.DIED

    @property
    def up(self) -> bool:
        return self.channel is not None and self.channel.ready

    @property
    def idle(self) -> bool:
        return self.up and self.task is None

    @property
    def tasks(self) -> list[Task]:
        """The task and the later ones."""
        return [self.task, *self.later] if self.task is not None else []

    def limit(self, at: float, then: Callable[..., None], *args: Any) -> None:
        """Replace the timer with one that calls `then` at the time `at` of the event loop."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_at(at, then, *args)

    def begin(self, task: Task, now: float) -> None:
        """Note that the worker gets `task`."""
        assert self.channel is not None
        self.task, self.since, self.ending = task, now, Ending.DIED
        self.processor_s = processor_seconds(self.channel.pid)

    def stop_late(self, limit_s: float) -> None:
        """Kill the worker, whose task has taken `limit_s`. If it has hardly worked in that time,
        the task is not what took so long."""
        if self.channel is None:  # it is over
            return
        worked = has_worked(self.channel.pid, self.processor_s, limit_s)
        self.stop(Ending.TIMED_OUT if worked else Ending.STALLED)

    def release(self) -> Task | None:
        """Remove and return the task, and cancel the timer."""
        task, self.task = self.task, None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        return task

    def stop(self, why: Ending) -> None:
        """Kill the worker, which is replaced when it has exited."""
        if self.channel is not None and self.channel.ready:
            self.ending = why
            self.channel.kill()


class Health:
    """Deaths of workers since the last finished picture.

    One event may end all workers, such as the end of their forkserver. So a death counts only if
    the start of the worker began after the last death that counted.
    """

    def __init__(self) -> None:
        self._died_at: list[float] = []

    def note_death(self, started: float) -> None:
        """Note that a worker died, or failed to start, whose start began at `started`."""
        if not self._deaths() or started >= self._died_at[-1]:
            self._died_at.append(time.monotonic())

    def note_finished(self) -> None:
        self._died_at.clear()

    @property
    def unhealthy(self) -> bool:
        return self._deaths() >= _UNHEALTHY_DEATHS

    @property
    def restart_delay_s(self) -> float:
        """The pause before the next start of a worker; it grows with the deaths in a row."""
        return _RESTART_DELAYS_S[min(self._deaths(), len(_RESTART_DELAYS_S) - 1)]

    def _deaths(self) -> int:
        """Deaths in a row; a calm period resets the count, as a finished picture does."""
        if self._died_at and time.monotonic() - self._died_at[-1] > _CALM_S:
            self._died_at.clear()
        return len(self._died_at)


@dataclass(frozen=True)
class SlotEvents:
    """The pool's callbacks, which run on the event loop."""

    on_ready: Callable[[], None]
    """A worker can take jobs."""

    on_reply: Callable[[Slot, protocol.Done | protocol.Failed, Features | None], None]

    on_lost: Callable[[Slot, Ending], None]
    """A worker ended or failed to start. The slot still has its tasks."""


class WorkerSlots:
    """Starts workers, and replaces those that end."""

    def __init__(self, forkserver: Forkserver, count: int, events: SlotEvents) -> None:
        self.all = [Slot() for _ in range(count)]
        # And some that no longer are idle. The last one to become so is at the end.
        self._idle: dict[Slot, None] = {}
        self.health = Health()
        self.settled = asyncio.Event()
        """Set when all workers have been up, or the pool is unhealthy."""
        self.confinement: Confinement | None = None
        """What confines the workers; None until the first is up."""
        self._forkserver = forkserver
        self._events = events
        self._threads = ThreadPoolExecutor(2, "image-workers")
        # Filled by threads that start workers; a cancelled start leaves its process here.
        self._processes: set[WorkerProcess] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._memory_kills = out_of_memory_kills()
        self._closing = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [slot.channel.pid for slot in self.all if slot.channel and slot.channel.ready]

    def first_idle(self) -> Slot | None:
        """The idle slot that worked last, whose memory is in the processor's caches."""
        while self._idle:
            slot = next(reversed(self._idle))
            if slot.idle:
                return slot
            del self._idle[slot]
        return None

    @property
    def ready(self) -> bool:
        """Whether a worker is up, or is being replaced after a harmless ending, and the pool is
        healthy."""
        usable = any(slot.up or slot.ending in _HARMLESS for slot in self.all)
        return usable and not self.health.unhealthy and not self._closing

    def start(self) -> None:
        """Start all workers in the background."""
        for slot in self.all:
            self._spawn(self._fill(slot))

    async def close(self) -> None:
        """Stop the workers and the forkserver."""
        self._closing = True
        for task in list(self._background):
            task.cancel()
        for slot in self.all:
            slot.release()
            if slot.channel is not None:
                slot.channel.close()
        self._forkserver.close()  # also ends a start that waits for the forkserver
        await asyncio.to_thread(self._end_processes)

    def _end_processes(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._forkserver.close()  # a start may have created a new one
        for slot in self.all:
            if slot.channel is not None:
                slot.channel.end()
        for process in list(self._processes):
            process.end()

    # ------------------------------------------------------------------ one slot

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _replace(self, slot: Slot, channel: WorkerChannel, process: WorkerProcess) -> None:
        metrics.image_worker_restarts.inc()
        loop, ending = asyncio.get_running_loop(), slot.ending
        if ending is Ending.DIED:
            # What killed this worker may be killing the one that would get its task next.
            await asyncio.sleep(_SETTLE_S)
            if await loop.run_in_executor(self._threads, self._died_by_itself, channel):
                ending = Ending.CRASHED
        if ending in _HARMLESS:
            log.info("image worker %d %s", channel.pid, ending)
        else:
            log.warning("image worker %d %s", channel.pid, ending)
            self._note_death(slot)
        self._events.on_lost(slot, ending)
        await loop.run_in_executor(self._threads, channel.end)
        self._processes.discard(process)
        await self._fill(slot)

    def _died_by_itself(self, channel: WorkerChannel) -> bool:
        """Whether a worker crashed or ran out of memory, and was not killed by others. Blocks."""
        kills, before = out_of_memory_kills(), self._memory_kills
        ran_out = kills > before
        self._memory_kills = max(kills, before)  # where no file was free, `kills` is 0
        return channel.crashed() or ran_out

    async def _fill(self, slot: Slot) -> None:
        """Put a new worker into `slot`, after a pause that grows with the deaths in a row."""
        loop = asyncio.get_running_loop()
        while slot.channel is None:
            await asyncio.sleep(self.health.restart_delay_s)
            slot.started = time.monotonic()
            try:
                process = await loop.run_in_executor(self._threads, self._start)
                slot.channel = self._channel(slot, process)
            except Exception as error:
                log.warning("failed to start image worker: %r", error)
                slot.ending = Ending.DIED
                slot.started = time.monotonic()  # a failed start is no consequence of other deaths
                self._note_death(slot)
                self._events.on_lost(slot, Ending.DIED)
        slot.limit(loop.time() + START_TIMEOUT_S, slot.channel.kill_unless_ready)

    def _start(self) -> WorkerProcess:
        process = self._forkserver.start()
        self._processes.add(process)
        return process

    def _channel(self, slot: Slot, process: WorkerProcess) -> WorkerChannel:
        return WorkerChannel(
            process,
            on_reply=lambda reply, features: self._on_reply(slot, reply, features),
            on_end=lambda: self._on_end(slot, process),
        )

    def _on_reply(self, slot: Slot, reply: protocol.FromWorker, features: Features | None) -> None:
        if isinstance(reply, protocol.Decoded):
            if slot.task is not None:
                slot.task.work.decoded = time.monotonic()
            return
        if not isinstance(reply, protocol.Ready):
            if isinstance(reply, protocol.Failed) and reply.ends:
                slot.ending = Ending.GAVE_UP
            self._note_idle(slot)
            self._events.on_reply(slot, reply, features)
            return
        slot.release()
        slot.ending = Ending.DIED
        self._note_idle(slot)
        self._note_confinement(reply.confinement)
        if all(slot.up for slot in self.all):
            self.settled.set()
        self._events.on_ready()

    def _note_idle(self, slot: Slot) -> None:
        self._idle.pop(slot, None)  # else it would keep its place
        self._idle[slot] = None

    def _note_confinement(self, found: Confinement) -> None:
        if found == self.confinement:
            return
        self.confinement = found
        metrics.image_worker_sandbox.labels("seccomp").set(found.seccomp)
        metrics.image_worker_sandbox.labels("landlock").set(bool(found.landlock))
        if found.refused:
            log.warning(
                "the sandbox of image workers is incomplete: the kernel refuses %s; in force: %s",
                " and ".join(found.refused),
                found,
            )
            if not found.suffices(self._forkserver.sandbox_mode):
                self.settled.set()  # the start of the pool stops waiting

    def _on_end(self, slot: Slot, process: WorkerProcess) -> None:
        channel, slot.channel = slot.channel, None
        if self._closing or channel is None:
            return
        self._spawn(self._replace(slot, channel, process))

    def _note_death(self, slot: Slot) -> None:
        self.health.note_death(slot.started)
        metrics.image_worker_deaths.inc()
        if self.health.unhealthy:
            self.settled.set()  # the start of the pool stops waiting

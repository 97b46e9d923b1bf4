"""The image worker pool, as the event loop sees it: bytes in, features out.

    features = await pool.process(key, data, job, timeline)

Requests for one `key` run once. Waiting work whose callers have all left is never started. A
worker that dies takes only its own picture along, which is tried once more on another worker; the
pool replaces it. Pictures and features pass through shared memory; what runs on the event loop
does not grow with the picture.
"""

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from server.errors import (
    WORKER_ERRORS,
    ImageProcessingFailed,
    ImageProcessingTimeout,
    SaccadeError,
    ServerBusy,
)
from server.settings import ImageSettings
from server.telemetry import metrics
from server.telemetry.stages import ImageWork, Timeline
from server.workers import protocol
from server.workers.channel import WorkerLink
from server.workers.features import Features
from server.workers.forkserver import Nursery
from server.workers.health import Health
from server.workers.jobs import (
    MAX_INT32,
    CountFrames,
    InspectPdf,
    Job,
    PixelsJob,
    ProcessJob,
    encode_job,
)
from server.workers.worker import WorkerSpec

log = logging.getLogger("saccade.images")

# One picture may take down this many workers before it is given up.
_ATTEMPTS = 2
_START_TIMEOUT_S = 120.0


@dataclass(eq=False)
class _Task:
    """One picture to process, for all who wait for it."""

    key: str
    data: bytes
    job: bytes
    result: asyncio.Future[Features]
    work: ImageWork
    waiters: int = 0
    attempts: int = 0


@dataclass(eq=False)
class _Seat:
    """A place for one worker; the worker in it may be replaced."""

    number: int
    link: WorkerLink | None = None
    task: _Task | None = None
    timer: asyncio.TimerHandle | None = None
    timed_out: bool = False

    @property
    def idle(self) -> bool:
        return self.link is not None and self.link.ready and self.task is None


class ImagePool:
    """`async with` starts and stops the workers; `process` is all there is to call."""

    def __init__(
        self,
        spec: WorkerSpec,
        settings: ImageSettings,
        on_work: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_work` is called whenever a worker gets an image."""
        self._nursery = Nursery(spec)
        self._settings = settings
        self._on_work = on_work
        self._queue: deque[_Task] = deque()
        self._tasks: dict[str, _Task] = {}
        self._seats = [_Seat(number) for number in range(settings.image_workers)]
        self._health = Health()
        self._threads = ThreadPoolExecutor(2, "image-pool")
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False
        self._next_id = 0

    # ------------------------------------------------------------------ start and stop

    def preload(self) -> None:
        """Load ahead what workers need; see `Nursery.preload`."""
        self._nursery.preload()

    async def __aenter__(self) -> "ImagePool":
        self.preload()
        metrics.image_workers.set(len(self._seats))
        metrics.image_queue_limit.set(self._settings.image_queue)
        for seat in self._seats:
            self._spawn(self._occupy(seat))
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._health.started.wait()
        except TimeoutError:
            await self.__aexit__(None, None, None)
            raise RuntimeError("the image workers did not come up; see the log above") from None
        if not self.ready:
            await self.__aexit__(None, None, None)
            raise RuntimeError("the image workers die at their start; see the log above")
        return self

    async def stop(self) -> None:
        """End the workers and the process they are forked from."""
        await self.__aexit__(None, None, None)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        for gauge in (metrics.image_workers, metrics.image_workers_up, metrics.image_queue_limit):
            gauge.set(0)
        for task in list(self._background):
            task.cancel()
        for waiting in list(self._tasks.values()):
            self._fail(waiting, ServerBusy("the server is shutting down"))
        links = [seat.link for seat in self._seats if seat.link is not None]
        for link in links:
            link.close()
        await asyncio.gather(*(asyncio.to_thread(link.join) for link in links))
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.stop_preload()

    def stop_preload(self) -> None:
        """End the process that workers are forked from, and with it any worker left."""
        self._nursery.close()

    # ------------------------------------------------------------------ what callers use

    @property
    def ready(self) -> bool:
        """Whether some worker can take pictures and they do not die one after the other."""
        return bool(self.worker_pids) and not self._health.is_hopeless and not self._closing

    @property
    def queued(self) -> int:
        """Pictures that wait for a worker."""
        return len(self._queue)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [seat.link.pid for seat in self._seats if seat.link is not None and seat.link.ready]

    async def process(
        self, key: str, data: bytes, job: PixelsJob | ProcessJob, timeline: Timeline
    ) -> Features:
        """What a worker makes of the encoded picture `data`; `key` must name data and job.
        `timeline` is the one of the request that waits.

        Raises:
            ServerBusy: the queue is full, or the server is shutting down.
            InvalidImage, ImageTooLarge: the worker refused the picture.
            ImageProcessingTimeout: it took longer than `image_timeout_s`.
            ImageProcessingFailed: two workers died on it.
        """
        return await self._run(key, data, job, timeline)

    async def inspect_pdf(
        self, data: bytes, max_pages: int, timeline: Timeline
    ) -> tuple[list[tuple[float, float]], int]:
        """The sizes of the first `max_pages` pages as (width, height) in points, and the number
        of all pages.

        Raises:
            InvalidFile: the PDF is damaged, encrypted, or has no pages.
            Otherwise as `process`.
        """
        job = InspectPdf(min(max_pages, MAX_INT32))
        features = await self._run(f"pdf-{max_pages}-{id(data)}", data, job, timeline)
        found = features.arrays(_numbers)
        return [(width, height) for width, height in found["sizes"]], found["count"]

    async def count_frames(self, data: bytes, timeline: Timeline) -> int:
        """The number of frames or pages of an image. Raises as `process`."""
        features = await self._run(f"frames-{id(data)}", data, CountFrames(), timeline)
        count: int = features.arrays(_numbers)["count"]
        return count

    async def _run(self, key: str, data: bytes, job: Job, timeline: Timeline) -> Features:
        came = time.monotonic()
        task = self._tasks.get(key)
        if task is None:
            task = self._enqueue(key, data, encode_job(job))
        else:
            metrics.images_joined.inc()
        task.waiters += 1
        timeline.join(task.work, came)
        try:
            return await asyncio.shield(task.result)
        finally:
            task.waiters -= 1
            if task.waiters == 0 and not task.result.done():
                self._abandon(task)

    # ------------------------------------------------------------------ the queue

    def _enqueue(self, key: str, data: bytes, job: bytes) -> _Task:
        if self._closing:
            raise ServerBusy("the server is shutting down")
        if self._health.is_hopeless and not self.worker_pids:
            raise ServerBusy("no image worker can take work")
        if len(self._queue) >= self._settings.image_queue:
            raise ServerBusy(
                f"{len(self._queue)} images wait to be processed, the limit is "
                f"{self._settings.image_queue}; try again later"
            )
        result = asyncio.get_running_loop().create_future()
        task = _Task(key, data, job, result, ImageWork(time.monotonic()))
        self._tasks[key] = task
        self._queue.append(task)
        self._dispatch()
        return task

    def _abandon(self, task: _Task) -> None:
        """Nobody waits for `task` any more: forget it, and drop it if it has not begun."""
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]
        with contextlib.suppress(ValueError):
            self._queue.remove(task)
            metrics.image_queue.set(len(self._queue))
            metrics.images_dropped.inc()
        task.result.cancel()

    def _dispatch(self) -> None:
        for seat in self._seats:
            if not self._queue:
                break
            if seat.idle:
                self._give(seat, self._queue.popleft())
        metrics.image_queue.set(len(self._queue))
        metrics.image_workers_up.set(len(self.worker_pids))
        metrics.image_workers_busy.set(sum(seat.task is not None for seat in self._seats))

    def _give(self, seat: _Seat, task: _Task) -> None:
        assert seat.link is not None
        task.attempts += 1
        if task.work.given is None:
            task.work.given = time.monotonic()
            metrics.image_queue_wait.observe(task.work.given - task.work.queued)
        self._next_id += 1
        seat.task, seat.timed_out = task, False
        self._on_work()
        loop = asyncio.get_running_loop()
        seat.timer = loop.call_later(self._settings.image_timeout_s, self._time_out, seat)
        if len(task.data) <= protocol.INLINE_BYTES:
            seat.link.send_inline(self._next_id, task.data, task.job)
        else:  # the copy into shared memory grows with the picture: not on the event loop
            link = seat.link
            args = (self._next_id, task.data, task.job)
            sending = loop.run_in_executor(self._threads, link.send, *args)
            sending.add_done_callback(functools.partial(_kill_if_unsent, link))

    def _time_out(self, seat: _Seat) -> None:
        seat.timed_out = True
        if seat.link is not None:
            seat.link.kill()  # `_on_death` answers the task

    # ------------------------------------------------------------------ answers

    def _on_reply(self, seat: _Seat, reply: protocol.FromWorker, features: Features | None) -> None:
        if isinstance(reply, protocol.Ready):
            if len(self.worker_pids) == len(self._seats):
                self._health.started.set()
            self._dispatch()
            return
        task = self._vacate(seat)
        self._health.note_finished()
        if task is not None:
            if isinstance(reply, protocol.Failed):
                self._fail(task, WORKER_ERRORS.get(reply.code, SaccadeError)(reply.message))
            else:
                assert features is not None
                task.work.preprocess_s = features.preprocess_s
                if reply.size is not None:  # else the file was only inspected
                    metrics.image_decode.observe(features.decode_s)
                    metrics.image_preprocess.observe(features.preprocess_s)
                self._finish(task, features)
        self._dispatch()

    def _on_death(self, seat: _Seat) -> None:
        if self._closing:
            return
        link, seat.link = seat.link, None
        task, timed_out = self._vacate(seat), seat.timed_out
        self._health.note_death()
        metrics.image_worker_deaths.inc()
        log.warning(
            "image worker %d %s", link.pid if link else -1, "timed out" if timed_out else "died"
        )
        if task is not None and not task.result.done():
            if timed_out:
                limit = self._settings.image_timeout_s
                self._fail(task, ImageProcessingTimeout(f"the image took longer than {limit:g} s"))
            elif task.attempts >= _ATTEMPTS:
                self._fail(task, ImageProcessingFailed("the image could not be processed"))
            else:
                self._queue.appendleft(task)
        if self._health.is_hopeless:
            self._health.started.set()  # a start that waits for the workers gives up
            if not self.worker_pids:
                for waiting in list(self._queue):
                    self._fail(waiting, ServerBusy("no image worker can take work"))
                self._queue.clear()
        self._spawn(self._occupy(seat, link))
        self._dispatch()

    def _vacate(self, seat: _Seat) -> _Task | None:
        task, seat.task = seat.task, None
        if seat.timer is not None:
            seat.timer.cancel()
            seat.timer = None
        return task

    def _finish(self, task: _Task, features: Features) -> None:
        task.work.done = time.monotonic()
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]
        if not task.result.done():
            task.result.set_result(features)

    def _fail(self, task: _Task, error: SaccadeError) -> None:
        task.work.done = time.monotonic()
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]
        if not task.result.done():
            task.result.set_exception(error)
            task.result.exception()  # all waiters may have left: do not warn about it

    # ------------------------------------------------------------------ workers

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _occupy(self, seat: _Seat, predecessor: WorkerLink | None = None) -> None:
        """Put a new worker into `seat`, after a pause that grows with the deaths in a row."""
        await asyncio.sleep(self._health.restart_delay_s)
        loop = asyncio.get_running_loop()
        if predecessor is not None:
            metrics.image_worker_restarts.inc()
            await loop.run_in_executor(self._threads, predecessor.join)
        try:
            name = f"saccade-image-{seat.number}"
            process, connection = await loop.run_in_executor(
                self._threads, self._nursery.start, name
            )
        except (OSError, EOFError) as error:  # the forking process died: the next start renews it
            log.warning("no image worker could be started: %s", error)
            self._on_death(seat)
            return
        link = seat.link = WorkerLink(
            process,
            connection,
            on_reply=lambda reply, features: self._on_reply(seat, reply, features),
            on_death=lambda: self._on_death(seat),
        )
        loop.call_later(_START_TIMEOUT_S, link.kill_unless_ready)


def _numbers(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Any:
    count = math.prod(shape)
    return np.frombuffer(buffer, dtype, count, offset).reshape(shape).tolist()


def _kill_if_unsent(link: WorkerLink, sending: asyncio.Future[None]) -> None:
    """A worker that never got its picture is replaced; its death brings the picture back."""
    if not sending.cancelled() and (error := sending.exception()) is not None:
        log.warning("an image could not be handed to its worker: %s", error)
        link.kill()

"""The image worker pool, as the event loop sees it: bytes in, features out.

    features = await pool.process(key, data, job, timeline)

Concurrent calls with the same `key` share one run. A task whose callers have all left is not
started; if it already runs, its worker is killed unless it finishes soon. If a worker dies, only
its picture is affected, which is retried once on another worker. Pictures and features pass through
shared memory, so the work on the event loop does not grow with the picture.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from server.workers.forkserver import Forkserver
from server.workers.jobs import (
    MAX_INT32,
    CountFrames,
    InspectPdf,
    Job,
    PixelsJob,
    ProcessJob,
    encode_job,
)
from server.workers.protocol import Features
from server.workers.slots import START_TIMEOUT_S, Ending, Slot, SlotEvents, Task, WorkerSlots
from server.workers.worker import WorkerSpec

# A picture fails after this many workers have died on it.
_ATTEMPTS = 2
# An abandoned task may run this long before its worker is killed. Replacing a worker takes some
# 25 ms of one core, and most pictures take less time than this.
ABANDONED_GRACE_S = 0.3


class ImagePool:
    """Decodes and preprocesses pictures; `async with` starts and stops the workers."""

    def __init__(
        self,
        spec: WorkerSpec,
        settings: ImageSettings,
        on_work: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_work` is called whenever a worker gets an image."""
        self._settings = settings
        self._on_work = on_work
        self._queue: deque[Task] = deque()
        self._tasks: dict[str, Task] = {}
        self._forkserver = Forkserver(spec)
        events = SlotEvents(self._dispatch, self._on_reply, self._on_lost)
        self._slots = WorkerSlots(self._forkserver, settings.image_workers, events)
        self._senders = ThreadPoolExecutor(2, "image-send")
        self._closing = False
        self._next_id = 0

    # ------------------------------------------------------------------ start and stop

    def preload(self) -> None:
        """Start to load what workers need; see `Forkserver.preload`."""
        self._forkserver.preload()

    def stop_preload(self) -> None:
        """Stop the forkserver and, with it, all remaining workers."""
        self._forkserver.close()

    async def __aenter__(self) -> "ImagePool":
        self.preload()
        self._show_gauges()
        self._slots.start()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._slots.settled.wait()
        except TimeoutError:
            await self.stop()
            raise RuntimeError("the image workers did not start; see the log above") from None
        if not self.ready:
            await self.stop()
            raise RuntimeError("the image workers die during start-up; see the log above")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Fail all tasks, and stop the workers and the forkserver."""
        self._closing = True
        for gauge in metrics.POOL_GAUGES:
            gauge.set_function(float)  # 0
        for task in list(self._tasks.values()):
            self._fail(task, ServerBusy("the server is shutting down"))
        self._queue.clear()
        await self._slots.close()
        self._senders.shutdown(wait=False, cancel_futures=True)

    def _show_gauges(self) -> None:
        """Let each scrape ask for the state of the pool."""
        slots = self._slots.all
        metrics.image_workers.set_function(lambda: len(slots))
        metrics.image_workers_up.set_function(lambda: len(self.worker_pids))
        metrics.image_workers_busy.set_function(lambda: sum(bool(slot.task) for slot in slots))
        metrics.image_queue.set_function(lambda: len(self._queue))
        metrics.image_queue_limit.set_function(lambda: self._settings.image_queue)

    # ------------------------------------------------------------------ what callers use

    @property
    def ready(self) -> bool:
        """Whether a worker can take pictures and the pool is healthy."""
        return self._slots.ready and not self._closing

    @property
    def queued(self) -> int:
        """The number of pictures that wait for a worker."""
        return len(self._queue)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return self._slots.pids

    async def process(
        self, key: str, data: bytes, job: PixelsJob | ProcessJob, timeline: Timeline
    ) -> Features:
        """Run `job` on the encoded picture `data` in a worker. `key` identifies data and job;
        `timeline` belongs to the waiting request.

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
        """(width, height) in points (1/72 inch) of each of the first `max_pages` pages, and the
        number of all pages.

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

    def _enqueue(self, key: str, data: bytes, job: bytes) -> Task:
        if self._closing:
            raise ServerBusy("the server is shutting down")
        if self._slots.health.unhealthy and not self.worker_pids:
            raise ServerBusy("no image worker is available")
        if len(self._queue) >= self._settings.image_queue:
            raise ServerBusy(
                f"{len(self._queue)} images wait to be processed, the limit is "
                f"{self._settings.image_queue}; try again later"
            )
        result = asyncio.get_running_loop().create_future()
        task = Task(key, data, job, result, ImageWork(time.monotonic()))
        self._tasks[key] = task
        self._queue.append(task)
        self._dispatch()
        return task

    def _abandon(self, task: Task) -> None:
        """Forget a task that has no callers left: drop it if it is queued, and kill its worker if
        it runs and does not finish soon."""
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]
        task.result.cancel()
        with contextlib.suppress(ValueError):
            self._queue.remove(task)
            metrics.images_dropped.inc()
        grace_s = min(ABANDONED_GRACE_S, self._settings.image_timeout_s)
        for slot in self._slots.all:
            if slot.task is task:
                slot.limit(slot.since + grace_s, self._stop_abandoned, slot)

    def _stop_abandoned(self, slot: Slot) -> None:
        metrics.images_dropped.inc()
        slot.stop(Ending.ABANDONED)

    def _dispatch(self) -> None:
        for slot in self._slots.all:
            if not self._queue:
                break
            if slot.idle:
                self._give(slot, self._queue.popleft())

    def _give(self, slot: Slot, task: Task) -> None:
        channel = slot.channel
        assert channel is not None
        now = time.monotonic()  # also the event loop's clock
        task.attempts += 1
        if task.work.given is None:
            task.work.given = now
            metrics.image_queue_wait.observe(now - task.work.queued)
        self._next_id += 1
        slot.task, slot.since, slot.ending = task, now, Ending.DIED
        self._on_work()
        slot.limit(now + self._settings.image_timeout_s, slot.stop, Ending.TIMED_OUT)
        if len(task.data) <= protocol.INLINE_BYTES:
            channel.send_inline(self._next_id, task.data, task.job)
        else:  # copied in a thread: large pictures would hold up the event loop
            self._senders.submit(channel.send, self._next_id, task.data, task.job)

    # ------------------------------------------------------------------ results

    def _on_reply(
        self, slot: Slot, reply: protocol.Done | protocol.Failed, features: Features | None
    ) -> None:
        task = slot.release()
        self._slots.health.note_finished()
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

    def _on_lost(self, task: Task | None, ending: Ending) -> None:
        if task is not None and not task.result.done():
            if ending is Ending.TIMED_OUT:
                limit = self._settings.image_timeout_s
                self._fail(task, ImageProcessingTimeout(f"the image took longer than {limit:g} s"))
            elif task.attempts >= _ATTEMPTS:
                self._fail(task, ImageProcessingFailed("the image could not be processed"))
            else:
                self._queue.appendleft(task)
        if self._slots.health.unhealthy and not self.worker_pids:
            for waiting in list(self._queue):
                self._fail(waiting, ServerBusy("no image worker is available"))
            self._queue.clear()
        self._dispatch()

    def _finish(self, task: Task, features: Features) -> None:
        self._forget(task)
        if not task.result.done():
            task.result.set_result(features)

    def _fail(self, task: Task, error: SaccadeError) -> None:
        self._forget(task)
        if not task.result.done():
            task.result.set_exception(error)
            task.result.exception()  # read it: else asyncio warns if all callers have left

    def _forget(self, task: Task) -> None:
        task.work.done = time.monotonic()
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]


def _numbers(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Any:
    count = math.prod(shape)
    return np.frombuffer(buffer, dtype, count, offset).reshape(shape).tolist()

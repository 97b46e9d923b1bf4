"""The image worker pool, as the event loop sees it: bytes in, features out.

    features = await pool.process(key, data, job, record)

Concurrent calls with the same `key` share one run. A task whose callers have all left is not
started; if it already runs, its worker is killed unless it finishes soon. If a worker dies or
stalls, only its picture is affected, which is retried once on another worker. A picture that
crashes both is refused; if both were killed or stopped by others, the answer is a 503. Pictures and
features pass through shared memory, so the work on the event loop does not grow with the picture.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np

from server.concurrency import usable_memory
from server.errors import (
    WORKER_ERRORS,
    CannotStart,
    ImageProcessingFailed,
    ImageProcessingTimeout,
    ImageQueueFull,
    SaccadeError,
    ServerBusy,
    WorkerLost,
)
from server.settings import ImageSettings
from server.telemetry import metrics
from server.telemetry.record import Record
from server.telemetry.stages import ImageWork
from server.workers import protocol
from server.workers.confinement import Confinement
from server.workers.forkserver import Forkserver
from server.workers.group_share import GroupShare
from server.workers.jobs import (
    ANIMATED,
    MAX_INT32,
    CountFrames,
    FindDetail,
    InspectPdf,
    Job,
    PdfText,
    PictureJob,
    PixelsJob,
    ProcessJob,
    encode_job,
)
from server.workers.protocol import Features
from server.workers.slots import START_TIMEOUT_S, Ending, Slot, SlotEvents, Task, WorkerSlots
from server.workers.task_queue import TaskQueue
from server.workers.worker import WorkerSpec

# A picture fails when it has lost this many workers.
_ATTEMPTS = 2
# By default, a quarter of the memory is for decoding. Most formats take less for each pixel.
_MEMORY_PARTS = 4
_BYTES_PER_PIXEL = 10
# An abandoned task may run this long before its worker is killed. Replacing a worker takes some
# 25 ms of one core, and most pictures take less time than this.
ABANDONED_GRACE_S = 0.3
_NO_WORKER = "no image worker is available: they die again and again"


class ImagePool:
    """Decodes and preprocesses pictures; `async with` starts and stops the workers."""

    def __init__(
        self,
        spec: WorkerSpec,
        settings: ImageSettings,
        on_work: Callable[[], None] = lambda: None,
        group_share: float = 1.0,
    ) -> None:
        """`on_work` is called whenever a worker gets an image. `group_share`: see `GroupShare`."""
        self._settings = settings
        self._on_work = on_work
        self._max_pixels = settings.max_decode_pixels or max(
            usable_memory() // _MEMORY_PARTS // _BYTES_PER_PIXEL, 1
        )
        self._queue = TaskQueue(GroupShare(settings.image_workers, group_share))
        self._tasks: dict[str, Task] = {}
        self.forkserver = Forkserver(spec)
        """Also starts processes for other work."""
        events = SlotEvents(self._dispatch, self._on_reply, self._on_lost)
        self._slots = WorkerSlots(self.forkserver, settings.image_workers, events)
        self._senders = ThreadPoolExecutor(2, "image-send")
        self._closing = False
        self._next_id = 0

    # ------------------------------------------------------------------ start and stop

    def preload(self) -> None:
        """Start to load what workers need; see `Forkserver.preload`."""
        self.forkserver.preload()

    def stop_preload(self) -> None:
        """Stop the forkserver and, with it, all remaining workers."""
        self.forkserver.close()

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
        if not self.confinement.suffices(self.forkserver.sandbox_mode):
            await self.stop()
            refused = " and ".join(self.confinement.refused)
            raise CannotStart(f"--worker-sandbox require: the kernel refuses {refused}")
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
        metrics.admission_limit.labels("decode_pixels").set(self._max_pixels)
        metrics.admission_held.labels("decode_pixels").set_function(lambda: self.decode_pixels)

    # ------------------------------------------------------------------ what callers use

    @property
    def ready(self) -> bool:
        """Whether a worker can take pictures and the pool is healthy."""
        return self._slots.ready and not self._closing

    @property
    def confinement(self) -> Confinement:
        """What confines the workers."""
        return self._slots.confinement or Confinement()

    @property
    def queued(self) -> int:
        """The number of pictures that wait for a worker."""
        return len(self._queue)

    @property
    def load(self) -> float:
        """Pictures in workers and waiting for them, for each worker."""
        slots = self._slots.all
        return (sum(bool(slot.task) for slot in slots) + self.queued) / max(1, len(slots))

    @property
    def decode_pixels(self) -> int:
        """The pixels of all pictures that are in a worker, by their headers."""
        return self._queue.pixels

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return self._slots.pids

    async def process(
        self, key: str, data: bytes, job: PixelsJob | ProcessJob, record: Record
    ) -> Features:
        """Run `job` on the encoded picture `data` in a worker. `key` identifies data and job;
        `record` belongs to the waiting request.

        Raises:
            ImageQueueFull: too many pictures wait.
            ServerBusy: the server is shutting down.
            InvalidImage, ImageTooLarge: the worker refused the picture.
            ImageProcessingTimeout: it took longer than `image_timeout_s`.
            ImageProcessingFailed: the second worker crashed on it, after a first was lost.
            WorkerLost: two workers were killed or stopped while they processed it, or no worker is
                up after many deaths.
        """
        return await self._run(key, data, job, record)

    async def inspect_pdf(
        self, data: bytes, max_pages: int, record: Record
    ) -> tuple[list[tuple[float, float]], int]:
        """(width, height) in points (1/72 inch) of each of the first `max_pages` pages, and the
        number of all pages.

        Raises:
            InvalidFile: the PDF is damaged, encrypted, or has no pages.
            Otherwise as `process`.
        """
        job = InspectPdf(min(max_pages, MAX_INT32))
        features = await self._run(f"pdf-{max_pages}-{id(data)}", data, job, record)
        found = features.arrays(_numbers)
        return [(width, height) for width, height in found["sizes"]], found["count"]

    async def pdf_text(self, data: bytes, page: int, most: int, record: Record) -> str:
        """The text layer of page `page` (from 0) of a PDF, of at most `most` characters. Raises as
        `process`."""
        features = await self._run(f"text-{page}-{id(data)}", data, PdfText(page, most), record)
        return bytes(features.arrays(_numbers)["text"]).decode()

    async def count_frames(self, data: bytes, record: Record) -> int:
        """The number of frames or pages of an image. Raises as `process`."""
        features = await self._run(f"frames-{id(data)}", data, CountFrames(), record)
        count: int = features.arrays(_numbers)["count"]
        return count

    async def find_detail(
        self, key: str, data: bytes, job: FindDetail, record: Record
    ) -> list[tuple[int, int, int, int]]:
        """The blocks with detail of a picture, left, top, right, bottom in pixels of `job.resize`.
        `key` identifies data and job. Raises as `process`."""
        found = (await self._run(key, data, job, record)).arrays(_numbers)["blocks"]
        return [(left, top, right, bottom) for left, top, right, bottom in found]

    async def _run(self, key: str, data: bytes, job: Job, record: Record) -> Features:
        came = time.monotonic()
        task = self._tasks.get(key)
        if task is None:
            task = self._enqueue(key, data, job, record.key_group or "")
        else:
            metrics.images_joined.inc()
        task.waiters += 1
        record.timeline.join(task.work, came)
        self._dispatch()
        try:
            return await asyncio.shield(task.result)
        finally:
            task.waiters -= 1
            if task.waiters == 0 and not task.result.done():
                self._abandon(task)

    # ------------------------------------------------------------------ the queue

    def _enqueue(self, key: str, data: bytes, job: Job, group: str) -> Task:
        if self._closing:
            raise ServerBusy("the server is shutting down")
        if self._slots.health.unhealthy and not self.worker_pids:
            raise WorkerLost(_NO_WORKER)
        if len(self._queue) >= self._settings.image_queue:
            raise ImageQueueFull(
                f"{len(self._queue)} images wait to be processed, the limit is "
                f"{self._settings.image_queue}; try again later"
            )
        result = asyncio.get_running_loop().create_future()
        task = Task(key, data, encode_job(job), result, ImageWork(time.monotonic()), group)
        if isinstance(job, PictureJob):
            task.pixels = math.prod(job.size)
            if job.format in ANIMATED:
                task.sequence, task.frame = id(data), job.frame
        self._tasks[key] = task
        self._queue.append(task)
        return task

    def _abandon(self, task: Task) -> None:
        """Forget a task that has no callers left: drop it if it is queued, and kill its worker if
        it runs, the worker's later tasks have no callers either, and it does not finish soon."""
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]
        task.result.cancel()
        if self._queue.remove(task):
            metrics.images_dropped.inc()
            return
        for slot in self._slots.all:
            if task in slot.tasks:
                self._limit(slot)

    def _limit(self, slot: Slot) -> None:
        """Limit the time of the slot's task."""
        timeout_s = self._settings.image_timeout_s
        if any(task.waiters for task in slot.tasks):
            slot.limit(slot.since + timeout_s, slot.stop_late, timeout_s)
        else:
            grace_s = min(ABANDONED_GRACE_S, timeout_s)
            slot.limit(slot.since + grace_s, self._stop_abandoned, slot)

    def _stop_abandoned(self, slot: Slot) -> None:
        metrics.images_dropped.inc()
        slot.stop(Ending.ABANDONED)

    def _dispatch(self) -> None:
        while self._queue and (slot := self._slots.first_idle()) is not None:
            tasks = self._next_tasks()
            if not tasks:
                return
            self._give(slot, tasks)

    def _next_tasks(self) -> list[Task]:
        """Take the next task from the queue. A frame of an animation comes with the waiting ones of
        the same file, in their order, since one pass decodes all of them."""
        first = self._queue.next()
        if first is None or not self._has_room(first):
            return []
        tasks = [first]
        if first.sequence is not None:
            tasks = self._queue.frames(first)
            sizes = itertools.accumulate(len(task.job) for task in tasks)
            tasks = tasks[: max(1, sum(size <= protocol.JOBS_BYTES for size in sizes))]
        for task in tasks:
            self._queue.remove(task)
        return tasks

    def _has_room(self, task: Task) -> bool:
        """Whether there is memory for one more picture to be decoded."""
        return not self.decode_pixels or self.decode_pixels + task.pixels <= self._max_pixels

    def _give(self, slot: Slot, tasks: list[Task]) -> None:
        channel = slot.channel
        assert channel is not None
        data, jobs = tasks[0].data, [task.job for task in tasks]
        first_id = self._next_id
        self._next_id += len(tasks)
        slot.later.extend(tasks)
        self._begin_next(slot)
        if len(data) <= protocol.INLINE_BYTES:
            channel.send_inline(first_id, data, jobs)
        else:  # copied in a thread: large pictures would hold up the event loop
            self._senders.submit(channel.send, first_id, data, jobs)

    def _begin_next(self, slot: Slot) -> None:
        """Note that the worker begins the next of its tasks."""
        now = time.monotonic()  # also the event loop's clock
        task = slot.later.popleft()
        task.attempts += 1
        if task.work.given is None:
            task.work.given = now
            metrics.image_queue_wait.observe(now - task.work.queued)
        slot.begin(task, now)
        self._queue.entered(task)
        self._on_work()
        self._limit(slot)

    # ------------------------------------------------------------------ results

    def _release(self, slot: Slot) -> Task | None:
        task = slot.release()
        if task is not None:
            self._queue.left(task)
        return task

    def _on_reply(
        self, slot: Slot, reply: protocol.Done | protocol.Failed, features: Features | None
    ) -> None:
        task = self._release(slot)
        if slot.later:
            self._begin_next(slot)
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

    def _on_lost(self, slot: Slot, ending: Ending) -> None:
        attempts = slot.task.attempts if slot.task is not None else 0
        # Later frames are decoded from the one that failed, so they share its fate.
        tasks = [task for task in slot.tasks if not task.result.done()]
        self._release(slot)
        slot.later.clear()
        for task in reversed(tasks):
            if ending is Ending.TIMED_OUT:
                limit = self._settings.image_timeout_s
                self._fail(task, ImageProcessingTimeout(f"the image took longer than {limit:g} s"))
            elif attempts < _ATTEMPTS:
                task.work.decoded = None
                self._queue.put_back(task)
            elif ending is Ending.CRASHED:
                self._fail(task, ImageProcessingFailed("the image could not be processed"))
            else:
                self._fail(task, WorkerLost("the workers that processed the image were lost"))
        if self._slots.health.unhealthy and not self.worker_pids:
            for waiting in list(self._queue):
                self._fail(waiting, WorkerLost(_NO_WORKER))
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

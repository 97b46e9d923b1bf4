"""The image worker pool, as the event loop sees it: bytes in, features out.

    features = await pool.process(key, data, options)

Requests for one `key` run once. Waiting work whose callers have all left is never started. A
worker that dies takes only its own picture along, which is tried once more on another worker; the
pool replaces it. Pictures and features pass through shared memory; what runs on the event loop
does not grow with the picture.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from server import metrics
from server.config import ImageSettings
from server.errors import (
    WORKER_ERRORS,
    ImageProcessingTimeout,
    ImageWorkerDied,
    SaccadeError,
    ServerBusy,
)
from server.images import messages, preload
from server.images.features import Features
from server.images.link import WorkerLink
from server.images.worker import WorkerSpec, main

log = logging.getLogger("saccade.images")

# One picture may take down this many workers before it is given up.
_ATTEMPTS = 2
# This many deaths in a row without one finished picture make the pool unready.
_HOPELESS_DEATHS = 5
_RESTART_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 5.0)
_START_TIMEOUT_S = 120.0


@dataclass(eq=False)
class _Task:
    """One picture to process, for all who wait for it."""

    key: str
    data: bytes
    options: Mapping[str, Any]
    result: asyncio.Future[Features]
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


@dataclass
class _Health:
    deaths_in_a_row: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)


class ImagePool:
    """`async with` starts and stops the workers; `process` is all there is to call."""

    def __init__(self, spec: WorkerSpec, settings: ImageSettings) -> None:
        self._spec = spec
        self._settings = settings
        self._context = multiprocessing.get_context("forkserver")
        self._queue: deque[_Task] = deque()
        self._tasks: dict[str, _Task] = {}
        self._seats = [_Seat(number) for number in range(settings.image_workers)]
        self._health = _Health()
        self._threads = ThreadPoolExecutor(2, "image-pool")
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False
        self._spec_file: Path | None = None
        self._next_id = 0

    # ------------------------------------------------------------------ start and stop

    def preload(self) -> None:
        """Start the process that workers are forked from; it loads the extractor meanwhile.

        Call it from a thread that lives as long as the server, since that process ends with it.
        """
        fd, name = tempfile.mkstemp(prefix="saccade-worker-")
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.msgpack.encode(self._spec))
        self._spec_file = Path(name)
        os.environ[preload.SPEC_VARIABLE] = name
        self._context.set_forkserver_preload(["server.images.preload"])
        forkserver.ensure_running()

    async def __aenter__(self) -> "ImagePool":
        if self._spec_file is None:
            self.preload()
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
        server: Any = forkserver._forkserver
        if (pid := server._forkserver_pid) is not None:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                server._stop()
        if self._spec_file is not None:
            self._spec_file.unlink(missing_ok=True)
            self._spec_file = None
            os.environ.pop(preload.SPEC_VARIABLE, None)

    # ------------------------------------------------------------------ what callers use

    @property
    def ready(self) -> bool:
        """Whether some worker can take pictures and they do not die one after the other."""
        alive = any(seat.link is not None and seat.link.ready for seat in self._seats)
        return alive and self._health.deaths_in_a_row < _HOPELESS_DEATHS and not self._closing

    @property
    def queued(self) -> int:
        """Pictures that wait for a worker."""
        return len(self._queue)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [seat.link.pid for seat in self._seats if seat.link is not None and seat.link.ready]

    async def process(self, key: str, data: bytes, options: Mapping[str, Any]) -> Features:
        """The features of the encoded picture `data`; `key` must name data and options.

        Raises:
            ServerBusy: the queue is full, or the server is shutting down.
            InvalidImage, ImageTooLarge: the worker refused the picture.
            ImageProcessingTimeout: it took longer than `image_timeout_s`.
            ImageWorkerDied: it took its worker down, twice.
        """
        task = self._tasks.get(key) or self._enqueue(key, data, options)
        task.waiters += 1
        try:
            return await asyncio.shield(task.result)
        finally:
            task.waiters -= 1
            if task.waiters == 0 and not task.result.done():
                self._abandon(task)

    # ------------------------------------------------------------------ the queue

    def _enqueue(self, key: str, data: bytes, options: Mapping[str, Any]) -> _Task:
        if self._closing:
            raise ServerBusy("the server is shutting down")
        if len(self._queue) >= self._settings.image_queue:
            raise ServerBusy(
                f"{len(self._queue)} images wait to be processed, the limit is "
                f"{self._settings.image_queue}; try again later"
            )
        task = _Task(key, data, options, asyncio.get_running_loop().create_future())
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
            metrics.images_dropped.inc()
        task.result.cancel()

    def _dispatch(self) -> None:
        for seat in self._seats:
            if not self._queue:
                break
            if seat.idle:
                self._give(seat, self._queue.popleft())
        metrics.image_queue.set(len(self._queue))

    def _give(self, seat: _Seat, task: _Task) -> None:
        assert seat.link is not None
        task.attempts += 1
        self._next_id += 1
        seat.task, seat.timed_out = task, False
        loop = asyncio.get_running_loop()
        seat.timer = loop.call_later(self._settings.image_timeout_s, self._time_out, seat)
        if len(task.data) <= messages.INLINE_BYTES:
            seat.link.send_inline(self._next_id, task.data, task.options)
        else:  # the copy into shared memory grows with the picture: not on the event loop
            link, number = seat.link, self._next_id
            loop.run_in_executor(self._threads, link.send, number, task.data, task.options)

    def _time_out(self, seat: _Seat) -> None:
        seat.timed_out = True
        if seat.link is not None:
            seat.link.kill()  # `_on_death` answers the task

    # ------------------------------------------------------------------ answers

    def _on_reply(self, seat: _Seat, reply: messages.FromWorker, features: Features | None) -> None:
        if isinstance(reply, messages.Ready):
            if len(self.worker_pids) == len(self._seats):
                self._health.started.set()
            self._dispatch()
            return
        task = self._vacate(seat)
        self._health.deaths_in_a_row = 0
        if task is not None:
            if isinstance(reply, messages.Failed):
                self._fail(task, WORKER_ERRORS.get(reply.code, SaccadeError)(reply.message))
            else:
                assert features is not None
                metrics.image_decode.observe(features.decode_s)
                metrics.image_preprocess.observe(features.preprocess_s)
                self._finish(task, features)
        self._dispatch()

    def _on_death(self, seat: _Seat) -> None:
        if self._closing:
            return
        link, seat.link = seat.link, None
        task, timed_out = self._vacate(seat), seat.timed_out
        self._health.deaths_in_a_row += 1
        metrics.image_worker_deaths.inc()
        log.warning(
            "image worker %d %s", link.pid if link else -1, "timed out" if timed_out else "died"
        )
        if task is not None and not task.result.done():
            if timed_out:
                limit = self._settings.image_timeout_s
                self._fail(task, ImageProcessingTimeout(f"the image took longer than {limit:g} s"))
            elif task.attempts >= _ATTEMPTS:
                self._fail(task, ImageWorkerDied("the image could not be processed"))
            else:
                self._queue.appendleft(task)
        if self._health.deaths_in_a_row >= _HOPELESS_DEATHS:
            self._health.started.set()  # a start that waits for the workers gives up
        self._spawn(self._occupy(seat, link))
        self._dispatch()

    def _vacate(self, seat: _Seat) -> _Task | None:
        task, seat.task = seat.task, None
        if seat.timer is not None:
            seat.timer.cancel()
            seat.timer = None
        return task

    def _finish(self, task: _Task, features: Features) -> None:
        if self._tasks.get(task.key) is task:
            del self._tasks[task.key]
        if not task.result.done():
            task.result.set_result(features)

    def _fail(self, task: _Task, error: SaccadeError) -> None:
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
        deaths = min(self._health.deaths_in_a_row, len(_RESTART_DELAYS_S) - 1)
        await asyncio.sleep(_RESTART_DELAYS_S[deaths])
        loop = asyncio.get_running_loop()
        if predecessor is not None:
            await loop.run_in_executor(self._threads, predecessor.join)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = self._context.Process(
            target=main, args=(theirs,), name=f"saccade-image-{seat.number}", daemon=True
        )
        try:
            await loop.run_in_executor(self._threads, process.start)
        except (OSError, EOFError) as error:  # the forking process died: the next start renews it
            log.warning("no image worker could be started: %s", error)
            ours.close()
            theirs.close()
            self._on_death(seat)
            return
        theirs.close()
        seat.link = WorkerLink(
            process,
            ours,
            on_reply=lambda reply, features: self._on_reply(seat, reply, features),
            on_death=lambda: self._on_death(seat),
        )

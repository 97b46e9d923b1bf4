"""Concurrency in this process: tasks of one request, threads for blocking work, usable cores and
memory."""

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# base64 and hashing release the GIL; more threads than this only compete for memory bandwidth.
_threads = ThreadPoolExecutor(4, "media")
# Calls that keep the GIL get so many bytes at a time.
SLICE_BYTES = 256 * 1024
# While other work comes in each iteration of the event loop, one task in turn goes on this often.
_LONGEST_WAY_S = 0.005


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run `work(*args)`, which processes the bytes of media, in a small pool of threads.

    The loop's default pool is left to other work: a slow disk may occupy its threads.
    """
    return await submitted(_threads, work, *args)


def slices(data: memoryview) -> Iterator[bytes]:
    """The bytes piece by piece, so that other threads run in between."""
    return (bytes(data[at : at + SLICE_BYTES]) for at in range(0, len(data), SLICE_BYTES))


def copied(data: memoryview) -> bytes:
    """As `bytes`, for which no other thread runs. Takes memory for two copies meanwhile."""
    return b"".join(list(slices(data)))  # joining releases the GIL


def submitted(executor: Executor, work: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
    """The result of `work(*args)` in a thread of `executor`. asyncio's `run_in_executor` has two
    futures for that, which watch each other and cost twice as much of the event loop's time."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()
    # In a list, from which the thread takes it. An error knows the thread's frames: if these knew
    # the result, which knows the error, all would live on, with `args`, until the garbage collector
    # finds the cycle.
    executor.submit(_run, loop, [result], work, args)
    return result


def _run(
    loop: asyncio.AbstractEventLoop,
    results: "list[asyncio.Future[T]]",
    work: Callable[..., T],
    args: Any,
) -> None:
    result = results.pop()
    if result.cancelled():
        return
    with contextlib.suppress(RuntimeError):  # the loop is closed
        try:
            value = work(*args)
        except BaseException as error:
            loop.call_soon_threadsafe(_settle, result, result.set_exception, error)
        else:
            loop.call_soon_threadsafe(_settle, result, result.set_result, value)
        finally:
            del result


def _settle(result: "asyncio.Future[T]", settle: Callable[[Any], None], value: Any) -> None:
    if not result.done():
        settle(value)


async def cancel(task: "asyncio.Task[None]") -> None:
    """Cancel `task`, and wait until it has ended. Raises what it raises."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def all_or_none(work: Iterable[Any]) -> list[Any]:
    """Run all of `work` concurrently and return the results in order.

    The first failure cancels the rest and is raised.
    """
    parts = list(work)
    if len(parts) == 1:  # most requests have one image, which needs no task of its own
        return [await parts[0]]
    async with _unwrapped(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in parts]
    return [task.result() for task in tasks]


class _unwrapped:
    """Raises the first error of a task group without its exception group.

    Before Python 3.13, the task that runs a failed group still counts as being cancelled, because
    the group cancels it while it waits for the others. This is undone.
    """

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            if self._task.cancelling() > self._cancelling:
                self._task.uncancel()
            raise error.exceptions[0] from None


class Turns:
    """Lets `most` tasks pass in each iteration of the event loop. The others wait, in order."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._renews = self._gives_way = False
        self._next_at = 0.0

    def give_way(self) -> None:
        """There is other work: no task passes in the next iteration, or one if none has for
        `_LONGEST_WAY_S`."""
        self._gives_way = True
        self._left = min(self._left, self._most_now())

    async def next(self) -> None:
        """Wait for a turn."""
        if not self._renews:
            self._renew_soon()
        if self._left and not self._waiting:
            self._note_pass()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _most_now(self) -> int:
        return int(time.monotonic() >= self._next_at) if self._gives_way else self._most

    def _note_pass(self) -> None:
        self._left -= 1
        if self._gives_way:
            self._next_at = time.monotonic() + _LONGEST_WAY_S

    def _renew_soon(self) -> None:
        self._renews = True
        asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._renews = False
        self._left = self._most_now()
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # and its task was not cancelled
                turn.set_result(None)
                self._note_pass()
        self._gives_way = False
        if self._waiting:
            self._renew_soon()


class _Done:
    def __await__(self) -> Generator[Any, None, None]:
        yield from ()


DONE: Awaitable[None] = _Done()
"""What functions return that would be coroutines if they had anything to wait for."""


class Begun(Generic[T]):
    """An awaitable that runs to its first wait before it is awaited, and may be over then.

    This does by hand what `await` does: it passes what the awaitable yields to the event loop, and
    the results back.
    """

    __slots__ = ("_steps", "_yielded", "is_over", "result")

    result: T
    """Set if `is_over`."""

    def __init__(self, awaitable: Awaitable[T]) -> None:
        self._steps: Any = awaitable.__await__()
        self._yielded: Any = None
        self.is_over = False

    def begin(self) -> bool:
        """Run to the first wait; returns whether it is over. Raises what it raises."""
        try:
            self._yielded = self._steps.send(None)
        except StopIteration as ended:
            self.result = ended.value
            self.is_over = True
        return self.is_over

    async def fail(self, error: BaseException) -> None:
        """Raise `error` where it waits, and wait until it has handled that."""
        try:
            self._yielded = self._steps.throw(error)
        except StopIteration:
            return
        await self.rest()

    @coroutine
    def rest(self) -> Generator[Any, Any, T]:
        """Wait for its result, unless it is over."""
        send, throw = self._steps.send, self._steps.throw
        try:
            while True:
                try:
                    value = yield self._yielded
                except BaseException as error:
                    self._yielded = throw(error)
                else:
                    self._yielded = send(value)
        except StopIteration as ended:
            result: T = ended.value
            return result


# ---------------------------------------------------------------------- cores and memory

_GROUPS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Where version 1 mounts a controller.
_V1_FOLDERS = {"cpu": ("cpu,cpuacct", "cpu"), "memory": ("memory",)}


def usable_cores(groups: Path = _GROUPS, root: Path = _ROOT) -> int:
    """The number of cores, at least 1: this process's part, if several share them. The file
    `groups` lists the control groups of this process; `root` is the folder where the control group
    file system is mounted."""
    cores = len(os.sched_getaffinity(0))
    quotas = [math.ceil(quota) for quota in _quotas(groups, root) if quota > 0]
    return max(1, min([cores, *quotas]) // _sharing_cores)


def _quotas(groups: Path, root: Path) -> Iterator[float]:
    """Yield the quota, in cores, of each control group of this process and of its ancestors."""
    for folder in _folders(groups, root, "cpu"):
        try:
            if (folder / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()  # -1: none
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota != "max":
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue


# How many processes of this kind share the memory, and the cores.
_sharing_memory = 1
_sharing_cores = 1


def share_memory(processes: int) -> None:
    """This process is one of so many that share the memory: `usable_memory` is its part."""
    global _sharing_memory
    _sharing_memory = processes


def share_cores(processes: int) -> None:
    """This process is one of so many that share the cores: `usable_cores` is its part."""
    global _sharing_cores
    _sharing_cores = processes


def usable_memory(groups: Path = _GROUPS, root: Path = _ROOT) -> int:
    """The memory in bytes: the machine's, or the lowest limit of a control group; see
    `usable_cores`."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _folders(groups, root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limit = (folder / name).read_text().strip()
            except OSError:
                continue
            if limit.isdigit():  # and not "max"
                found = min(found, int(limit))
    return found // _sharing_memory


def _folders(groups: Path, root: Path, controller: str) -> Iterator[Path]:
    """Yield the folder of each control group with `controller`, and those of its ancestors.

    In a container the path may be the host's and not exist; the ancestors still apply.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        bases = (root / name for name in _V1_FOLDERS[controller]) if controllers else (root,)
        for base in bases:
            folder = base / path.lstrip("/")
            while folder != base:
                yield folder
                folder = folder.parent
            yield base

"""Runs the tasks of one request concurrently, and blocking work in threads."""

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

# base64 and hashing release the GIL; more threads than this only compete for memory bandwidth.
_threads = ThreadPoolExecutor(4, "media")


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run `work(*args)`, which processes the bytes of media, in a small pool of threads.

    The loop's default pool is left to other work: a slow disk may occupy its threads.
    """
    return await asyncio.get_running_loop().run_in_executor(
        _threads, functools.partial(work, *args)
    )


async def all_or_none(work: Iterable[Any]) -> list[Any]:
    """Run all of `work` concurrently and return the results in order.

    The first failure cancels the rest and is raised.
    """
    async with _unwrapped(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in work]
    return [task.result() for task in tasks]


class _unwrapped:
    """Raises the first error of a task group without its exception group."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None

"""Work of one request that goes on side by side, and work that is done in threads."""

import asyncio
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

# base64 and hashing let go of the GIL; more threads than this only wait for memory.
_threads = ThreadPoolExecutor(4, "media")


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run `work` on the bytes of media in one of a few threads. The loop's own are for others:
    uvloop has four, and a slow disk or lookup may hold them."""
    return await asyncio.get_running_loop().run_in_executor(
        _threads, functools.partial(work, *args)
    )


async def all_or_none(work: Iterable[Any]) -> list[Any]:
    """Gather; the first failure cancels the rest, whose results nobody would use."""
    async with _unwrapped(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in work]
    return [task.result() for task in tasks]


class _unwrapped:
    """Raises the first error of a task group as itself."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None

"""Several pieces of work for one request at a time."""

import asyncio
from collections.abc import Iterable
from typing import Any


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

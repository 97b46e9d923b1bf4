"""Concurrency in this process: tasks of one request, threads for blocking work, usable cores."""

import asyncio
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
    parts = list(work)
    if len(parts) == 1:  # most requests have one image, which needs no task of its own
        return [await parts[0]]
    async with _unwrapped(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in parts]
    return [task.result() for task in tasks]


class _unwrapped:
    """Raises the first error of a task group without its exception group."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None


# ---------------------------------------------------------------------- cores

_V1_FOLDERS = ("cpu,cpuacct", "cpu")


def usable_cores(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """The number of cores, at least 1. The file `groups` lists the control groups of this process;
    `root` is the folder where the control group file system is mounted."""
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for quota in _quotas(groups, root) if quota > 0]
    return max(1, min(cores, *(math.ceil(quota) for quota in quotas))) if quotas else cores


def _quotas(groups: Path, root: Path) -> Iterator[float]:
    """Yield the quota, in cores, of each control group of this process and of its ancestors."""
    for folder in _folders(groups, root):
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


def _folders(groups: Path, root: Path) -> Iterator[Path]:
    """Yield the folder of each control group, and those of its ancestors.

    In a container the path may be the host's and not exist; the ancestors still apply.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (root / name for name in _V1_FOLDERS) if controllers else (root,):
            folder = base / path.lstrip("/")
            while folder != base:
                yield folder
                folder = folder.parent
            yield base

"""Counts the cores that this process may use, by CPU affinity and by its container's quota."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

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

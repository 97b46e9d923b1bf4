"""What the processes of a server use: memory, open files, threads, shared memory."""

import collections
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import Server, proportional

_SHARED_MEMORY = Path("/dev/shm")
_TITLES = (
    ("SACCADE::ImageWorker", "image workers"),
    ("SACCADE::VideoDecoder", "video decoders"),
    ("VLLM::EngineCore", "engine core"),
    ("VLLM::Worker", "engine worker"),
    ("SACCADE::Forkserver", "forkserver"),
    ("SACCADE::Template", "forkserver's template"),
    ("forkserver", "forkserver"),
    ("resource_tracker", "resource tracker"),
)
# What a role may have more of at the end: freed heap that glibc keeps varies by so much.
_MEMORY_TOLERANCE_MIB = 32.0
_MEMORY_TOLERANCE = 0.05
# Workers keep shared memory (memfd) for the next pictures: as many for each as this, at most.
_MAX_SEGMENTS = 12
_SEGMENT = "/memfd:saccade-image"


@dataclass
class Use:
    """What all processes of one role use; memory in MiB. `segments` are descriptors of the image
    workers' shared memory; `files` are the others, but for /dev/null: a worker has it in the place
    of each descriptor that the forkserver happened to have."""

    processes: int = 0
    threads: int = 0
    files: int = 0
    segments: int = 0
    anonymous_mib: float = 0.0
    resident_mib: float = 0.0
    proportional_mib: float | None = None


@dataclass
class Sample:
    """One moment, `at_s` seconds after the start of the run. Sizes are in bytes."""

    at_s: float
    roles: dict[str, Use]
    shm_segments: int
    shm_bytes: int
    temporary_files: int
    open_by_kind: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> Use:
        """The sum over all roles."""
        uses = [asdict(use) for use in self.roles.values()]
        return Use(**{name: sum(use[name] or 0 for use in uses) for name in asdict(Use())})

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "at_s": round(self.at_s, 1),
            "roles": {role: _rounded(asdict(use)) for role, use in sorted(self.roles.items())},
        }


def sample(server: Server, began: float, folder: Path, *, thorough: bool = False) -> Sample:
    """The present use. `folder` is the server's TMPDIR.

    A thorough sample has proportional memory, for which the kernel walks all pages, and the kinds
    of open files.
    """
    roles: dict[str, Use] = {}
    kinds: dict[str, collections.Counter[str]] = {}
    for pid in server.pids():
        role = "server" if pid == server.pid else _role(_read(pid, "cmdline"))
        status = _read(pid, "status")
        use = roles.setdefault(role, Use())
        use.processes += 1
        use.threads += _number(status, "Threads")
        use.anonymous_mib += _number(status, "RssAnon") / 1024
        use.resident_mib += _number(status, "VmRSS") / 1024
        opened = _open_files(pid)
        segments = sum(target.startswith(_SEGMENT) for target in opened)
        use.segments += segments
        use.files += len(opened) - segments - opened.count(os.devnull)
        if thorough:
            use.proportional_mib = (use.proportional_mib or 0.0) + proportional([pid]) / 2**20
            kinds.setdefault(role, collections.Counter()).update(map(_kind, opened))
    sizes = _segment_sizes(folder)
    return Sample(
        time.monotonic() - began,
        roles,
        len(sizes),
        sum(sizes),
        sum(len(files) for _, _, files in os.walk(folder)),
        {role: dict(sorted(counted.items())) for role, counted in sorted(kinds.items())},
    )


def left_over(folder: Path) -> list[str]:
    """What a server that has ended left in its TMPDIR and in /dev/shm."""
    ids = [path.name.removeprefix("saccade-run-") for path in folder.glob("saccade-run-*")]
    segments = [str(path) for name in ids for path in _SHARED_MEMORY.glob(f"{name}_*")]
    return [*(str(path.name) for path in folder.glob("saccade-run-*")), *segments]


def growth(before: Sample, after: Sample) -> list[str]:
    """What the server has more of after the soak, as sentences; empty if there is nothing."""
    found, workers = [], after.roles.get("image workers", Use()).processes
    for role in sorted(before.roles.keys() | after.roles.keys()):
        old, new = before.roles.get(role, Use()), after.roles.get(role, Use())
        found += _counts(f"{role}: ", ("processes", "threads", "files"), old, new)
        if new.segments > (most := _MAX_SEGMENTS * workers):
            found.append(f"{role}: {new.segments} segments of shared memory, more than {most}")
        grown = new.anonymous_mib - old.anonymous_mib
        if grown > max(_MEMORY_TOLERANCE_MIB, _MEMORY_TOLERANCE * old.anonymous_mib):
            found.append(f"{role}: anonymous memory grew by {grown:.0f} MiB")
    return found + _counts("", ("shm_segments", "shm_bytes", "temporary_files"), before, after)


def _counts(prefix: str, names: tuple[str, ...], old: object, new: object) -> list[str]:
    return [
        f"{prefix}{name} grew from {getattr(old, name)} to {getattr(new, name)}"
        for name in names
        if getattr(new, name) > getattr(old, name)
    ]


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Growth of each role's anonymous memory under load in MiB an hour, by a straight line
    through the second half of the samples."""
    half = samples[len(samples) // 2 :]
    roles = set.intersection(*(set(each.roles) for each in half)) if len(half) > 2 else set()
    found = {}
    for role in sorted(roles):
        line = statistics.linear_regression(
            [each.at_s / 3600 for each in half], [each.roles[role].anonymous_mib for each in half]
        )
        found[role] = round(line.slope, 1)
    return found


def _role(title: str) -> str:
    return next((role for text, role in _TITLES if text in title), "other")


def _segment_sizes(folder: Path) -> list[int]:
    """The sizes of the server's segments in /dev/shm, whose names begin with its folder's id."""
    sizes = []
    for path in folder.glob("saccade-run-*"):
        for segment in _SHARED_MEMORY.glob(f"{path.name.removeprefix('saccade-run-')}_*"):
            try:
                sizes.append(segment.stat().st_size)
            except FileNotFoundError:
                continue
    return sizes


def _open_files(pid: int) -> list[str]:
    folder, targets = f"/proc/{pid}/fd", []
    try:
        for name in os.listdir(folder):
            try:
                targets.append(os.readlink(f"{folder}/{name}"))
            except FileNotFoundError:
                continue
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return targets


def _kind(target: str) -> str:
    """A file's path, or the kind of another descriptor, without numbers."""
    return re.sub(r"saccade-run-\w+", "TMP", re.sub(r":\[\d+\]", "", target))


def _number(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _rounded(use: dict[str, Any]) -> dict[str, Any]:
    return {name: round(v, 1) if isinstance(v, float) else v for name, v in use.items()}

"""The cores and the memory that a process may use, by its affinity and its control groups."""

import os
from pathlib import Path

import pytest

from server.concurrency import usable_cores, usable_memory


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


def write(folder: Path, groups: str, files: dict[str, str]) -> None:
    (folder / "cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1 = "3:memory:/a\n2:cpu,cpuacct:/docker/x\n1:name=systemd:/a\n"


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "900000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "garbage\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n"}, 1),
        (V1, {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "300000\n",
              "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)  # fmt: skip
def test_the_cgroup_quota_limits_the_cores(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    write(tmp_path, groups, files)
    assert usable_cores(tmp_path / "cgroup", tmp_path / "root") == expected


@pytest.mark.usefixtures("four_cores")
def test_the_affinity_limits_the_cores_without_control_groups(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 4


MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1_MEMORY = "memory/docker/x/memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", {"memory.max": "max\n"}, MACHINE),
        ("0::/\n", {"memory.max": "1000000\n"}, 1_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "2000\n", "a/memory.max": "1000\n"}, 1000),
        ("3:cpu:/a\n2:memory:/docker/x\n", {V1_MEMORY: "4096\n"}, 4096),
        ("2:memory:/docker/x\n", {V1_MEMORY: f"{1 << 63}\n"}, MACHINE),
    ],
)
def test_the_cgroup_limits_the_memory(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    write(tmp_path, groups, files)
    assert usable_memory(tmp_path / "cgroup", tmp_path / "root") == expected

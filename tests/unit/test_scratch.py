"""What servers leave in temporary folders and in /dev/shm."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.engine.vllm_adapter.shared_segments import ReservedMemory, reason
from server.scratch import remove_left

SHARED_MEMORY = Path("/dev/shm")
# Owns a folder with a file and a segment, and waits.
OWNER = """
import pathlib, sys, time
from server.scratch import Scratch
scratch = Scratch()
(scratch.path / "socket").touch()
pathlib.Path("/dev/shm", scratch.id + "_0").touch()
print(scratch.path, flush=True)
if sys.stdin.readline() == "fail\\n":
    raise OSError
"""


def owner(parent: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A process that owns a folder, and what is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "TMPDIR": str(parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    segment = SHARED_MEMORY / f"{folder.name.removeprefix('saccade-run-')}_0"
    return process, [folder / "socket", segment]


def end(process: subprocess.Popen[str], line: str) -> None:
    process.communicate(line, timeout=60)


@pytest.mark.parametrize("line", ["stop\n", "fail\n"])
def test_a_server_that_ends_leaves_nothing(tmp_path: Path, line: str) -> None:
    process, files = owner(tmp_path)
    assert all(file.exists() for file in files)
    end(process, line)
    assert not any(file.exists() for file in files)
    assert list(tmp_path.iterdir()) == []


def test_the_next_start_removes_only_what_dead_servers_left(tmp_path: Path) -> None:
    killed, left = owner(tmp_path)
    killed.kill()
    end(killed, "")
    assert all(file.exists() for file in left)
    alive, kept = owner(tmp_path)
    assert not any(file.exists() for file in left)
    remove_left(tmp_path)
    assert all(file.exists() for file in kept)
    end(alive, "stop\n")


def test_a_segment_without_room_is_refused_with_a_clear_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(SHARED_MEMORY.iterdir())
    found = os.statvfs(SHARED_MEMORY)
    with pytest.raises(OSError, match="MiB free of .* enlarge it"):
        ReservedMemory(create=True, size=(found.f_blocks + 1) * found.f_frsize)
    assert set(SHARED_MEMORY.iterdir()) - before == set()
    left = reason()
    assert left is not None
    assert "/dev/shm has" in left


def test_a_segment_is_reserved_when_it_is_created() -> None:
    segment = ReservedMemory(create=True, size=1 << 20)
    try:
        blocks = (SHARED_MEMORY / segment.name).stat().st_blocks
        assert blocks * 512 >= 1 << 20
    finally:
        segment.close()
        segment.unlink()

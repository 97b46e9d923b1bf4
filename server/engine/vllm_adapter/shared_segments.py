"""Names and reserves the segments that vLLM's processes create in /dev/shm.

With a name of ours, the next start can remove what a killed server has left. Memory that is
reserved at once cannot be missing later, when writing to it would kill the process (SIGBUS).
"""

import os
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

# The file in which a process leaves its reason for not starting.
REASON = "cannot-start"
_FOLDER = "/dev/shm"  # noqa: S108 - where segments are
_MIB = 1 << 20


class ReservedMemory(shared_memory.SharedMemory):
    """`SharedMemory` whose memory exists when it has been created.

    Raises:
        OSError: /dev/shm has too little room.
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
        super().__init__(name, create, size)
        if not create:
            return
        segment: Any = self
        try:
            os.posix_fallocate(segment._fd, 0, size)
        except OSError:
            self.close()
            self.unlink()
            raise _no_room(size) from None


def _no_room(size: int) -> OSError:
    found = os.statvfs(_FOLDER)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    reason = (
        f"{_FOLDER} has {free // _MIB} MiB free of {total // _MIB} MiB, and vLLM's processes need "
        f"{size // _MIB} MiB more there; enlarge it (docker --shm-size, shm_size, a memory volume)"
    )
    if folder := os.environ.get("TMPDIR"):
        Path(folder, REASON).write_text(reason)
    return OSError(reason)


def register(prefix: str) -> None:
    """Create segments with names that begin with `prefix`, and reserved."""
    module: Any = shared_memory
    module._SHM_NAME_PREFIX = f"/{prefix}_"
    module.SharedMemory = ReservedMemory

"""The temporary folder of one server: its sockets and files, removed when the server stops.

A killed server removes nothing, so the next start does it. The owner of a folder holds a lock in
it, which the kernel releases when the owner ends, however it ends. Segments in /dev/shm begin with
the folder's id.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

log = logging.getLogger("saccade")

_PREFIX = "saccade-run-"
_LOCK = "lock"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where segments are
# Names of sockets have at most 107 bytes; vLLM's have 36 bytes after the folder's.
_MAX_PATH = 107 - 37
# torch keeps what it compiled in the temporary folder, for later starts.
_COMPILED = ("TORCHINDUCTOR_CACHE_DIR", f"torchinductor_{os.geteuid()}")


class Scratch:
    """Takes over the temporary files of this process and of those that it starts."""

    def __init__(self) -> None:
        """Create the folder, and remove those of servers that were killed."""
        parent = Path(tempfile.gettempdir())
        remove_left(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._owner = os.getpid()
        # Locked before it has the name under which others look for it.
        unnamed = self.path / "unnamed"
        self._lock = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)
        if len(os.fsencode(self.path)) <= _MAX_PATH:
            variable, folder = _COMPILED
            os.environ.setdefault(variable, str(parent / folder))
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.path)
        # After the children of `multiprocessing` have ended, and after the removal of its own
        # folder, which is in this one and has the priority -100.
        Finalize(None, self.remove, exitpriority=-200)

    @property
    def id(self) -> str:
        """What the names of the server's segments in /dev/shm begin with."""
        return _id(self.path)

    def remove(self) -> None:
        """Remove the folder and the segments. Forks of the owner do not."""
        if os.getpid() == self._owner:
            _remove(self.path)


def remove_left(parent: Path) -> None:
    """Remove what servers that were killed have left in `parent` and in /dev/shm."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if folder.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # being created or removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its server runs
            continue
        else:
            _remove(folder)
            log.info("removed what a killed server had left: %s", folder)
        finally:
            os.close(lock)


def _id(folder: Path) -> str:
    return folder.name.removeprefix(_PREFIX)


def _remove(folder: Path) -> None:
    for segment in _SHARED_MEMORY.glob(f"{_id(folder)}_*"):
        with contextlib.suppress(OSError):
            if segment.stat(follow_symlinks=False).st_uid == os.geteuid():
                segment.unlink()
    shutil.rmtree(folder, ignore_errors=True)

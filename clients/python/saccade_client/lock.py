"""Keeps two processes from writing the same output."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from saccade_client.errors import OutputLocked

_LOCKED = (errno.EACCES, errno.EAGAIN)
_SUFFIX = ".lock"


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Be the only process that writes `output` meanwhile. A file beside it has the lock, which ends
    with the process. Where there are no locks, nothing is checked.

    Raises:
        OutputLocked: another process writes it.
        OSError: the file with the lock cannot be made.
    """
    path = output.resolve()
    path = path.with_name(path.name + _SUFFIX)
    while True:
        with path.open("ab") as file:
            if not _lock(file):
                raise OutputLocked(f"another process writes its results to {output}")
            if _is_at(file, path):  # or else the process before has removed it just now
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # Windows keeps open files
                        path.unlink()
                return


def _lock(file: BinaryIO) -> bool:
    """Whether no other process has the lock."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        # Unlike `flock`, this lock is not inherited by children, which may end later.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _LOCKED  # or else the file system has no locks
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

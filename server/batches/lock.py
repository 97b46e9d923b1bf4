"""Keeps two processes from writing the same output."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from server.errors import CannotStart

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Be the only process that writes `output` meanwhile. A file beside it has the lock, which ends
    with the process. On a file system without locks, there is none.

    Raises:
        CannotStart: another process writes it.
        OSError: the folder cannot be written.
    """
    path = output.with_name(output.name + ".lock")
    while True:
        with path.open("ab") as file:
            try:
                # Unlike `flock`, this one is not inherited by the engine, which may end later.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise CannotStart(f"another process writes the results to {output}") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if _is_at(file, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        # The process before has removed it just now.


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

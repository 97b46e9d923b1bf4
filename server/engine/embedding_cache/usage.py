"""How many bytes several servers keep in a directory, as they all agree: a number in a file."""

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NUMBER = struct.Struct("<Q")
_LONGEST_WAIT_S = 5.0
_POLL_INTERVAL_S = 0.002


@dataclass
class Count:
    """`nbytes` is None if nobody has counted yet."""

    nbytes: int | None
    _fd: int

    def add(self, nbytes: int) -> None:
        """Count what is going to be written."""
        self.nbytes = (self.nbytes or 0) + nbytes
        self.save()

    def save(self) -> None:
        if self.nbytes is not None:
            os.pwrite(self._fd, _NUMBER.pack(max(0, self.nbytes)), 0)


class Usage:
    """The number in the file `path`. What is written is counted before, what is deleted afterwards:
    a server that is killed leaves the number too high, not too low, until the next one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[Count]:
        """The number, to be read and changed while no other thread or server does.

        Raises:
            OSError: the file cannot be used; TimeoutError if another server does not let go of it.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(fd)
            data = os.pread(fd, _NUMBER.size, 0)
            before = _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else None
            count = Count(before, fd)
            try:
                yield count
            finally:
                count.save()
        finally:
            os.close(fd)


def _lock(fd: int) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("the directory is locked") from None
        time.sleep(_POLL_INTERVAL_S)

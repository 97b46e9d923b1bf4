"""What API keys have used, counted by several front ends together: in memory that they share.

Each limit has a slot, found by the hash of its name. Only to take a new slot needs a lock. A front
end counts the requests that run there in a cell of its own. Of two that take from a bucket in the
same microsecond one may be lost, which errs on the side of the client.
"""

import fcntl
import mmap
from collections.abc import MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

_NAME_BYTES = 16
_BUCKET_BYTES = 16  # two numbers
_BUCKETS = 3
_CELL_BYTES = 8
_NO_NAME = bytes(_NAME_BYTES)
# Slots that are tried for a name.
_MOST_TRIED = 64


@dataclass(frozen=True)
class Cells:
    """The memory of one limit.

    Attributes:
        buckets: (level, time) of each bucket.
        active: the requests that run in each front end; `mine` is the index of this one's.
    """

    buckets: tuple[MutableSequence[float], ...]
    active: MutableSequence[int]
    mine: int


def own_cells() -> Cells:
    """Those of a server with one front end."""
    return Cells(tuple([0.0, 0.0] for _ in range(_BUCKETS)), [0], 0)


class SharedUsages:
    """The cells of all limits."""

    def __init__(self, memory: mmap.mmap, lock: Path, mine: int, count: int) -> None:
        """`memory` is zero at first. `lock` is a file that all can write; of `count` front ends,
        this one is `mine`."""
        self._memory = memoryview(memory)
        self._lock = lock
        self._mine = mine
        self._count = count
        self._slot_bytes = _NAME_BYTES + _BUCKETS * _BUCKET_BYTES + count * _CELL_BYTES
        self._slots = len(memory) // self._slot_bytes

    def cells(self, name: str) -> Cells:
        """The cells of a limit. If there is no room for more limits, those of this process."""
        wanted = blake3(name.encode()).digest(_NAME_BYTES)
        start = int.from_bytes(wanted, "little")
        for step in range(_MOST_TRIED):
            at = (start + step) % self._slots * self._slot_bytes
            if self._name(at) == _NO_NAME:
                self._take(at, wanted)
            if self._name(at) == wanted:
                return self._cells(at)
        return own_cells()

    def forget_mine(self) -> None:
        """No requests run here: the one in this place was killed."""
        for at in range(0, self._slots * self._slot_bytes, self._slot_bytes):
            if self._name(at) != _NO_NAME:
                self._cells(at).active[self._mine] = 0

    def _name(self, at: int) -> bytes:
        return bytes(self._memory[at : at + _NAME_BYTES])

    def _take(self, at: int, name: bytes) -> None:
        """Give a slot this name, unless another process has given it one."""
        with self._lock.open("ab") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # until the file is closed, or this process is killed
            if self._name(at) == _NO_NAME:
                self._memory[at : at + _NAME_BYTES] = name

    def _cells(self, at: int) -> Cells:
        at += _NAME_BYTES
        buckets: list[Any] = []
        for _ in range(_BUCKETS):
            buckets.append(self._memory[at : at + _BUCKET_BYTES].cast("d"))
            at += _BUCKET_BYTES
        active: Any = self._memory[at : at + self._count * _CELL_BYTES].cast("q")
        return Cells(tuple(buckets), active, self._mine)

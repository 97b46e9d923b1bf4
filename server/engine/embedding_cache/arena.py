"""A region of shared memory of fixed size, allocated in pages.

It is anonymous (memfd), so it needs no space in /dev/shm and is freed with its processes. The
kernel allocates memory when a page is first written. An arena may be in memory of another process,
which outlives this one; then a directory beside it says what it holds.
"""

import bisect
import contextlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.embedding_cache.directory import (
    PAGE_BYTES,
    Directory,
    Extents,
    size_for,
)


@dataclass(frozen=True)
class ArenaName:
    """The address of an arena, for processes of the same user on the same machine."""

    pid: int
    fd: int
    nbytes: int


class FreePages:
    """The free pages of an arena, as ordered runs of (first page, count)."""

    def __init__(self, pages: int) -> None:
        self._runs = [(0, pages)] if pages else []
        self.free = pages

    def take(self, pages: int) -> list[tuple[int, int]] | None:
        """Allocate `pages` pages: one run if a free run is long enough, else several. None if too
        few pages are free."""
        if pages > self.free:
            return None
        self.free -= pages
        fitting = [i for i, (_, count) in enumerate(self._runs) if count >= pages]
        if fitting:
            best = min(fitting, key=lambda i: self._runs[i][1])
            first, count = self._runs[best]
            self._runs[best : best + 1] = [(first + pages, count - pages)] if count > pages else []
            return [(first, pages)]
        taken = []
        for first, count in sorted(self._runs, key=lambda run: -run[1]):
            used = min(count, pages)
            taken.append((first, used))
            pages -= used
            if not pages:
                break
        gone = dict(taken)
        self._runs = [
            (first + used, count - used)
            for first, count in self._runs
            if count > (used := gone.get(first, 0))
        ]
        return taken

    def occupy(self, taken: Iterable[tuple[int, int]]) -> None:
        """Allocate these runs, none of which overlap, of pages that are all free."""
        runs, at = [], 0
        for first, count in sorted(taken):
            self.free -= count
            if first > at:
                runs.append((at, first - at))
            at = first + count
        end = sum(self._runs[-1]) if self._runs else 0
        self._runs = [*runs, (at, end - at)] if end > at else runs

    def give_back(self, first: int, count: int) -> None:
        """Free a run and join it with its free neighbours."""
        self.free += count
        at = bisect.bisect(self._runs, (first, count))
        if at < len(self._runs) and self._runs[at][0] == first + count:
            count += self._runs.pop(at)[1]
        if at and sum(self._runs[at - 1]) == first:
            first, before = self._runs[at - 1]
            self._runs[at - 1] = (first, before + count)
        else:
            self._runs.insert(at, (first, count))


class LastingMemory:
    """Memory for an arena of `nbytes`, as long as this process lives or `close` is called."""

    def __init__(self, nbytes: int) -> None:
        pages = nbytes // PAGE_BYTES
        self._fd = os.memfd_create("saccade-embeddings")
        os.ftruncate(self._fd, max(pages * PAGE_BYTES + size_for(pages), mmap.PAGESIZE))

    @property
    def path(self) -> str:
        """The file by which other processes of the same user find it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        os.close(self._fd)


class Arena:
    """The region, in the process that allocates in it. Calls must not be concurrent; access to its
    memory may be.

    Attributes:
        directory: what another process will find here, if the memory outlives this one; else None.
    """

    def __init__(self, nbytes: int, path: str | None = None) -> None:
        """`path`: that of the `LastingMemory` of `nbytes` that it is in. Nothing in it is allocated
        until `occupy` is called."""
        pages = nbytes // PAGE_BYTES
        self.nbytes = pages * PAGE_BYTES
        if path is None:
            self._fd = os.memfd_create("saccade-embeddings")
            os.ftruncate(self._fd, max(self.nbytes, mmap.PAGESIZE))
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        self._memory = memoryview(self._map)
        self._pages = FreePages(pages)
        self.directory: Directory | None = None
        if path is not None and pages:
            self.directory = Directory(self._fd, self._memory, self.nbytes)

    @property
    def name(self) -> ArenaName:
        return ArenaName(os.getpid(), self._fd, len(self._map))

    @property
    def free_bytes(self) -> int:
        return self._pages.free * PAGE_BYTES

    def allocate(self, nbytes: int) -> Extents | None:
        """Allocate `nbytes` bytes; None if there is not enough room."""
        runs = self._pages.take(_pages(nbytes))
        if runs is None:
            return None
        extents, left = [], nbytes
        for first, count in runs:
            length = min(left, count * PAGE_BYTES)
            extents.append((first * PAGE_BYTES, length))
            left -= length
        return tuple(extents)

    def occupy(self, places: Iterable[Extents]) -> None:
        """Allocate these places, in an arena in which nothing is allocated yet."""
        self._pages.occupy(
            (offset // PAGE_BYTES, _pages(length)) for place in places for offset, length in place
        )

    def free(self, extents: Extents) -> None:
        """Free an allocation."""
        for offset, length in extents:
            self._pages.give_back(offset // PAGE_BYTES, _pages(length))

    def views(self, extents: Extents) -> list[memoryview]:
        """The memory at `extents`, without a copy."""
        return [self._memory[offset : offset + length] for offset, length in extents]

    def close(self) -> None:
        """Release the memory, now or with the last view of it."""
        self._memory.release()
        os.close(self._fd)
        with contextlib.suppress(BufferError):
            self._map.close()


def attach(name: ArenaName) -> mmap.mmap:
    """Map the memory of an arena in any process.

    Raises:
        OSError: the arena's process is gone, or runs elsewhere or as another user.
    """
    fd = os.open(f"/proc/{name.pid}/fd/{name.fd}", os.O_RDWR)
    try:
        return mmap.mmap(fd, name.nbytes)
    finally:
        os.close(fd)


def size_on_pages(nbytes: int) -> int:
    """The bytes that an entry of `nbytes` takes in an arena, which allocates whole pages."""
    return _pages(nbytes) * PAGE_BYTES


def _pages(nbytes: int) -> int:
    return max(1, -(-nbytes // PAGE_BYTES))

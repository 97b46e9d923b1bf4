"""A region of shared memory of fixed size, allocated in pages.

It is anonymous (memfd), so it needs no space in /dev/shm and is freed with its processes. The
kernel allocates memory when a page is first written.
"""

import bisect
import contextlib
import mmap
import os
from dataclasses import dataclass

PAGE_BYTES = 64 * 1024

# The place of an entry: (offset, length) in bytes of each piece, in order.
Extents = tuple[tuple[int, int], ...]


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


class Arena:
    """The region, in the process that created it. Calls must not be concurrent; access to its
    memory may be."""

    def __init__(self, nbytes: int) -> None:
        pages = nbytes // PAGE_BYTES
        self.nbytes = pages * PAGE_BYTES
        self._fd = os.memfd_create("saccade-embeddings")
        os.ftruncate(self._fd, max(self.nbytes, mmap.PAGESIZE))
        self._map = mmap.mmap(self._fd, max(self.nbytes, mmap.PAGESIZE))
        self._memory = memoryview(self._map)
        self._pages = FreePages(pages)

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

"""How a process keeps and returns the memory that pictures took from its heap (glibc)."""

import ctypes
import functools

from server.workers.shared_memory import PAGE


def keep_freed_memory(limit_bytes: int) -> None:
    """Let this process keep up to `limit_bytes` of freed heap instead of returning it each time.

    By default glibc maps every large buffer afresh and the kernel zeroes it page by page: for a
    12-megapixel picture that is half of the decoding time. A no-op where there is no glibc.

    The limit is for the top of the heap. What is freed below something that stays is kept without
    limit: see `FreedMemory`.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    if (libc := _libc()) is not None:
        libc.mallopt(m_trim_threshold, limit_bytes)
        libc.mallopt(m_mmap_max, 0)


class FreedMemory:
    """Gives freed heap back, wherever it lies, once the process has grown by `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._most_bytes = private_bytes() + limit_bytes

    def check(self) -> None:
        """Cheap, unless there is much to give back."""
        libc = _libc()
        if libc is None or private_bytes() <= self._most_bytes:
            return
        libc.malloc_trim(0)
        # What is left is in use: growth is counted from there.
        self._most_bytes = max(self._most_bytes, private_bytes() + self._limit_bytes // 2)


def private_bytes() -> int:
    """Resident memory of this process that is not shared with a file or another process's."""
    with open("/proc/self/statm") as file:
        _, resident, shared = (int(pages) for pages in file.read().split()[:3])
    return (resident - shared) * PAGE


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        assert libc.mallopt
        assert libc.malloc_trim
    except (OSError, AttributeError):  # no glibc
        return None
    return libc

"""Anonymous shared memory that two processes map, passed as a file descriptor.

memfd needs no /dev/shm (64 MiB in a default container), has no name that a killed process could
leave behind, and is freed by the kernel with its last user.
"""

import contextlib
import ctypes
import functools
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
ALIGNMENT = 64
MIN_SEGMENT_BYTES = 1 << 20


class Segment:
    """A mapped memfd of `capacity` bytes."""

    def __init__(self, fd: int, capacity: int) -> None:
        """Maps `fd`, which stays open and belongs to the segment."""
        self.fd = fd
        self.capacity = capacity
        self.map = mmap.mmap(fd, capacity)

    @classmethod
    def create(cls, nbytes: int) -> "Segment":
        """A new segment for at least `nbytes`, rounded up so that it can be used again."""
        capacity = max(MIN_SEGMENT_BYTES, 1 << (nbytes - 1).bit_length())
        fd = os.memfd_create("saccade-image", os.MFD_CLOEXEC)
        os.ftruncate(fd, capacity)
        return cls(fd, capacity)

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last array on it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(BufferError):  # arrays still look at it; their end unmaps it
            self.map.close()


class ArrayWriter:
    """Places arrays one after the other in a byte buffer that is found when it is needed."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self.nbytes = 0

    def add(self, array: npt.NDArray[Any]) -> int:
        """Plan a place for `array`; returns its offset in bytes."""
        offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        self._arrays.append(array)
        self.nbytes = offset + array.nbytes
        return offset

    def write(self, buffer: mmap.mmap) -> None:
        """Copy every planned array to its place."""
        offset = 0
        for array in self._arrays:
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            if array.nbytes:
                place = np.frombuffer(buffer, np.uint8, array.nbytes, offset)
                place.view(array.dtype).reshape(array.shape)[...] = array
            offset += array.nbytes


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

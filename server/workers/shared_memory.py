"""Anonymous shared memory that two processes map, passed as a file descriptor.

memfd needs no /dev/shm (64 MiB in a default container), has no name that a killed process could
leave behind, and is freed by the kernel with its last descriptor and mapping.
"""

import contextlib
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
MIN_SEGMENT_BYTES = 1 << 20


class Segment:
    """A mapped memfd of `capacity` bytes."""

    def __init__(self, fd: int, capacity: int) -> None:
        """Map `fd`, which the segment owns from now on."""
        self.fd = fd
        self.capacity = capacity
        self.map = mmap.mmap(fd, capacity)

    @classmethod
    def received(cls, fd: int, capacity: int) -> "Segment":
        """Map `fd`, which the caller keeps. Raises ValueError if the file is smaller."""
        segment = cls(fd, capacity)
        segment.fd = -1
        return segment

    @classmethod
    def create(cls, nbytes: int) -> "Segment":
        """Create a segment of at least `nbytes`, rounded up so that it also fits later pictures."""
        capacity = max(MIN_SEGMENT_BYTES, 1 << (nbytes - 1).bit_length())
        fd = os.memfd_create("saccade-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, capacity)
            return cls(fd, capacity)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the descriptor; the mapping is released with the last array over it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(BufferError):  # arrays use the mapping; the last one releases it
            self.map.close()


class ArrayWriter:
    """Lays out arrays one after the other, for a buffer that is allocated when the size is
    known."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self.nbytes = 0

    def add(self, array: npt.NDArray[Any]) -> int:
        """Append `array` to the layout; returns its offset in bytes."""
        offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        self._arrays.append(array)
        self.nbytes = offset + array.nbytes
        return offset

    def write(self, buffer: "mmap.mmap | npt.NDArray[np.uint8]") -> None:
        """Copy the arrays to their offsets in `buffer`."""
        offset = 0
        for array in self._arrays:
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            if array.nbytes:
                place = np.frombuffer(buffer, np.uint8, array.nbytes, offset)
                place.view(array.dtype).reshape(array.shape)[...] = array
            offset += array.nbytes

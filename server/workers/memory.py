"""What memory a process has, and control over the freed memory that it keeps."""

import contextlib
import ctypes
import functools
import mmap
import os
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# How often a process looks for freed memory to return, and how much is worth the pause: some 0.1 ms
# for each MiB, during which its other threads cannot allocate. While the process is idle, the pause
# delays nobody.
_RETURN_INTERVAL_S = 20.0
_WORTH_RETURNING_BYTES = 32 << 20
_WORTH_RETURNING_IDLE_BYTES = 1 << 20
# In which pieces it is returned, from large to small.
_PIECES = tuple(kib << 10 for kib in (16384, 4096, 1024, 256))
_IDLE_SHARE = 0.05  # of a processor


def keep_freed_memory(limit_bytes: int) -> None:
    """Let this process keep up to `limit_bytes` of freed heap instead of returning it each time.

    By default glibc maps every large buffer anew and the kernel zeroes it page by page: for a
    12-megapixel picture that is half of the decoding time. Does nothing without glibc.

    The limit applies to the top of the heap. Freed memory below a live allocation is kept without
    limit: see `FreedMemory`.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_TRIM_THRESHOLD, limit_bytes)
        libc.mallopt(_M_MMAP_MAX, 0)


def keep_freed_memory_in_one_heap() -> None:
    """Let this process keep all freed heap until `return_in_pieces`, and all of its threads use one
    heap. Does nothing without glibc.

    To return a large buffer takes some 0.1 ms for each MiB, and so does to get it anew. The thread
    that frees it has the GIL meanwhile. With a heap for each thread, a buffer that no thread's heap
    can hold, or that leaves one empty, is returned however much may be kept.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)


class FreedMemory:
    """Returns all freed heap to the system once the process has grown by `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._most_bytes = private_bytes() + limit_bytes

    def check(self) -> None:
        """Cheap, unless there is much to return."""
        if private_bytes() <= self._most_bytes:
            return
        return_freed_memory()
        # What is left is in use: growth is counted from there.
        self._most_bytes = max(self._most_bytes, private_bytes() + self._limit_bytes // 2)


def return_freed_memory() -> None:
    """Return all freed heap to the system. Takes some milliseconds, during which other threads
    cannot allocate. Does nothing without glibc."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def return_in_pieces() -> None:
    """Return all freed heap to the system. Other threads can allocate meanwhile, unless they have
    heaps of their own. Does nothing without glibc.

    `malloc_trim` holds the heap's lock while it returns all of it. So pieces of the heap are
    allocated first, which nobody else can use then, and their pages returned without the lock.
    What is left for `malloc_trim` are pages between small allocations.
    """
    libc = _libc()
    heap = _heap_info()
    if libc is None or heap is None:
        return_freed_memory()
        return
    libc.malloc.restype = ctypes.c_void_p
    held = []
    for nbytes in _PIECES:
        while (before := heap()).fordblks > nbytes:
            address = libc.malloc(ctypes.c_size_t(nbytes))
            if not address:
                break
            held.append(address)
            now = heap()
            if now.arena > before.arena or now.hblkhd > before.hblkhd:  # nothing so large was free
                break
            first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (address + nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), mmap.MADV_DONTNEED)
    for address in held:
        libc.free(ctypes.c_void_p(address))
    libc.malloc_trim(0)


def return_regularly() -> None:
    """Return freed heap to the system from now on, in a thread of this process. Does nothing
    without glibc.

    glibc returns only the end of its heap by itself. After a flood, gigabytes of freed buffers stay
    below some small object that is in use.
    """
    if _libc() is not None:
        threading.Thread(target=_return_regularly, name="freed-memory", daemon=True).start()


def _return_regularly() -> None:
    return_in_pieces()
    least = _outside_of_heap_bytes()
    while True:
        used_s = time.process_time()
        time.sleep(_RETURN_INTERVAL_S)
        is_idle = time.process_time() - used_s < _IDLE_SHARE * _RETURN_INTERVAL_S
        worth = _WORTH_RETURNING_IDLE_BYTES if is_idle else _WORTH_RETURNING_BYTES
        if _outside_of_heap_bytes() > least + worth:
            return_in_pieces()
            least = _outside_of_heap_bytes()
        least = min(least, _outside_of_heap_bytes())


def _outside_of_heap_bytes() -> int:
    """Private memory that is in no allocation of the heap: what others have mapped, which hardly
    changes, and freed heap that has not been returned."""
    heap_info = _heap_info()
    if heap_info is None:
        return private_bytes()
    heap = heap_info()
    return private_bytes() - int(heap.uordblks) - int(heap.hblkhd)


def _heap_info() -> Any:
    """The function that describes the heap; None without glibc 2.33 or later."""
    found: Any = getattr(_libc(), "mallinfo2", None)
    if found is not None:
        found.restype = _HeapInfo
    return found


class _HeapInfo(ctypes.Structure):
    """`struct mallinfo2` of the C library: of the `arena` bytes of the heap, `uordblks` are
    allocated and `fordblks` free; `hblkhd` bytes are in large allocations beside it."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks")),
        *((name, ctypes.c_size_t) for name in ("hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        assert libc.mallopt
        assert libc.malloc_trim
    except (OSError, AttributeError):  # no glibc
        return None
    return libc


# ---------------------------------------------------------------------- sizes and bounds


@contextlib.contextmanager
def bounded_memory(nbytes: int) -> Iterator[None]:
    """This process can map at most `nbytes` more meanwhile; Python raises MemoryError then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = mapped_bytes() + nbytes
    limit = bound if soft == resource.RLIM_INFINITY else min(soft, bound)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mapped_bytes() -> int:
    """The address space that this process has mapped."""
    return _pages()[0] * mmap.PAGESIZE


def private_bytes() -> int:
    """Resident memory of this process that it shares with no file and no other process."""
    _, resident, shared, *_ = _pages()
    return (resident - shared) * mmap.PAGESIZE


def allocated_bytes() -> int:
    """What counts for RLIMIT_DATA: private memory that this process may write, touched or not."""
    return _pages()[5] * mmap.PAGESIZE


def _pages() -> list[int]:
    """The numbers in /proc/self/statm: mapped, resident, shared, text, 0, data, 0, in pages."""
    return [int(pages) for pages in os.pread(_statm(os.getpid()), 256, 0).split()]


@functools.lru_cache(maxsize=1)
def _statm(_pid: int) -> int:
    """An open /proc/self/statm. It stays open, because a confined process cannot open it. A fork
    needs its own: an inherited descriptor tells about the parent."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

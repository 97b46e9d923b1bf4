"""Set-up of child processes, and control over the freed memory that a process keeps."""

import contextlib
import ctypes
import functools
import mmap
import signal

import setproctitle

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Added to the badness by which the kernel chooses what to kill; the greatest value is 1000.
_OOM_SCORE = "500"


def start_child(title: str) -> None:
    """Set up this process as a child of the server: name, signals, and its end with the parent.

    When memory runs out, the kernel kills this process before the server.
    """
    setproctitle.setproctitle(title)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OOM_SCORE)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# ---------------------------------------------------------------------- heap


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


class FreedMemory:
    """Returns all freed heap to the system once the process has grown by `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._most_bytes = private_bytes() + limit_bytes

    def check(self) -> None:
        """Cheap, unless there is much to return."""
        libc = _libc()
        if libc is None or private_bytes() <= self._most_bytes:
            return
        libc.malloc_trim(0)
        # What is left is in use: growth is counted from there.
        self._most_bytes = max(self._most_bytes, private_bytes() + self._limit_bytes // 2)


def mapped_bytes() -> int:
    """The address space that this process has mapped."""
    return _pages()[0] * mmap.PAGESIZE


def private_bytes() -> int:
    """Resident memory of this process that it shares with no file and no other process."""
    _, resident, shared = _pages()
    return (resident - shared) * mmap.PAGESIZE


def _pages() -> tuple[int, int, int]:
    """Mapped, resident and shared pages of this process."""
    with open("/proc/self/statm") as file:
        mapped, resident, shared = (int(pages) for pages in file.read().split()[:3])
    return mapped, resident, shared


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        assert libc.mallopt
        assert libc.malloc_trim
    except (OSError, AttributeError):  # no glibc
        return None
    return libc

"""Makes vLLM's processes sleep while they wait for each other and images want the cores.

On a CPU vLLM runs its scheduler and its model in two processes that talk through shared memory.
Each waits by calling `sched_yield` in a loop for up to a second after the last message, which is
right where every process has a core of its own. On a CPU the cores are those that the image
workers need: on two of them, half of the scheduler's time and a third of the model's went into
this loop. So while there is image work, the loops sleep a tenth of a millisecond at each turn;
a second after the last of it they spin as before, since sleeping then only adds the time it takes
to wake up. But even then they sleep once in a while: where Linux schedules by sessions (autogroup),
processes that only yield can keep those of other sessions from the cores for many seconds.

(vLLM's own blocking wait, which it takes after that second, is no way out: it may miss a message
that comes at the wrong moment, and then sleeps until its next check. With a check every two
milliseconds, the engine took an eighth less processor time for large photos, but there were a sixth
fewer requests/s of small ones, since a process takes longer to wake.)

The front end notes in shared memory when there was image work last. The memory is anonymous: a
write to a mapped file would kill the process (SIGBUS) when the disk of the file is full.
"""

import mmap
import os
import time
from typing import Any

from server.engine.vllm_adapter import plugin

_SLEEP_S = 1e-4
_RECENT_S = 1.0
_SPIN_S = 5e-3  # the longest time without a sleep

# When an image worker last got an image, on the system's monotonic clock.
_last_work: Any = None  # a memoryview of doubles


def ask() -> None:
    """Ask for it in the vLLM processes that this process starts from now on."""
    global _last_work
    fd = os.memfd_create("saccade-work")  # open as long as this process lives, for the others
    os.ftruncate(fd, mmap.PAGESIZE)
    _last_work = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("d")
    plugin.ask(image_work=f"/proc/{os.getpid()}/fd/{fd}")


def path() -> str | None:
    """The file that `ask` made, for `join`; None if it was not called."""
    return plugin.asked().image_work


def join(path: str) -> None:
    """Tell the engines of another process, whose file is `path`."""
    global _last_work
    with open(path, "r+b") as file:
        _last_work = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("d")


def note_work() -> None:
    """Tell the engine's processes that an image worker is at work."""
    if _last_work is not None:
        _last_work[0] = time.monotonic()


def register(path: str) -> None:
    """Change how readers of vLLM's message queue wait. `path`: the file that `ask` made."""
    if not os.path.exists(path):
        return
    from vllm.distributed.device_communicators import shm_broadcast

    with open(path, "rb") as file:
        shared = mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)
    last_work: Any = memoryview(shared).cast("d")

    slept = 0.0

    def look_again() -> None:
        nonlocal slept
        now = time.monotonic()
        if now - last_work[0] < _RECENT_S or now - slept > _SPIN_S:
            time.sleep(_SLEEP_S)
            slept = now
        else:
            os.sched_yield()

    # The module's own name for it, which its waiting loops look up at each turn.
    vars(shm_broadcast)["sched_yield"] = look_again

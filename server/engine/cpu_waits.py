"""Makes vLLM's processes sleep while they wait for each other and image workers want the cores.

On a CPU vLLM runs its scheduler and its model in two processes that talk through shared memory.
Each waits by calling `sched_yield` in a loop for up to a second after the last message, which is
right where every process has a core of its own. On a CPU the cores are those that the image
workers need: on two of them, half of the scheduler's time and a third of the model's went into
this loop. So while image workers are busy, the loops sleep a tenth of a millisecond at each turn;
while none is, they spin as before, since sleeping then only adds the time it takes to wake up.

(vLLM's own blocking wait, which it takes after that second, is no way out: it may miss a message
that comes at the wrong moment, and then sleeps until its next check.)

The front end tells in one shared byte whether image workers are busy. vLLM calls `register` in
each of its processes (entry point `vllm.general_plugins`); it does nothing unless this server has
asked for it, so that a plain vLLM in the same environment stays what it is.
"""

import atexit
import mmap
import os
import tempfile
import time
from pathlib import Path

_VARIABLE = "_SACCADE_WORKERS_BUSY"
_SLEEP_S = 1e-4

_busy: mmap.mmap | None = None


def ask() -> None:
    """Ask for it in the vLLM processes that this process starts."""
    global _busy
    fd, path = tempfile.mkstemp(prefix="saccade-busy-")
    os.ftruncate(fd, mmap.PAGESIZE)
    _busy = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    os.environ[_VARIABLE] = path
    atexit.register(Path(path).unlink, missing_ok=True)


def set_busy(workers: int) -> None:
    """Tell the engine's processes how many image workers are at work."""
    if _busy is not None:
        _busy[0] = min(workers, 255)


def register() -> None:
    """Change how readers of vLLM's message queue wait, if this server asked for it."""
    path = os.environ.get(_VARIABLE)
    if path is None or not os.path.exists(path):
        return
    from vllm.distributed.device_communicators import shm_broadcast

    with open(path, "rb") as file:
        busy = mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)

    def look_again() -> None:
        if busy[0]:
            time.sleep(_SLEEP_S)
        else:
            os.sched_yield()

    # The module's own name for it, which its waiting loops look up at each turn.
    vars(shm_broadcast)["sched_yield"] = look_again

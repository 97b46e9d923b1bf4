"""Child processes that end when their parent does, however it ends.

Where a server is killed, by the kernel for want of memory or by hand, nothing is left to tell its
children; an engine that stays would keep the GPU.
"""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1
_VARIABLE = "_SACCADE_LIFELINE"


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ask() -> None:
    """Have the vLLM processes that this process starts, and those that they start, end with it."""
    os.environ[_VARIABLE] = "1"


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`)."""
    parent = multiprocessing.parent_process()
    if _VARIABLE not in os.environ or parent is None:
        return
    die_with_parent()
    if os.getppid() != parent.pid:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)

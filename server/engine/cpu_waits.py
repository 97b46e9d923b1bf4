"""Makes vLLM's processes sleep while they wait for each other, where cores are shared.

On a CPU vLLM runs its scheduler and its model in two processes that talk through shared memory.
Each waits by calling `sched_yield` in a loop for up to a second after the last message, which is
right where every process has a core of its own. On a CPU the cores are those that the image
workers need: on two of them, half of the scheduler's and a third of the model's process went into
this loop. Here they sleep for some 50 microseconds between two looks.

(vLLM's own blocking wait, which it takes after that second, is no way out: it may miss a message
that comes at the wrong moment, and then sleeps until its next check.)

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It does
nothing unless this server has asked for it, so that a plain vLLM in the same environment stays
what it is.
"""

import ctypes
import os
import time

_VARIABLE = "_SACCADE_SLEEPING_WAITS"
_SLEEP_S = 5e-5
# By default the kernel wakes a sleeper up to 50 microseconds late, to save wake-ups.
_PR_SET_TIMERSLACK, _SLACK_NS = 29, 1000


def ask() -> None:
    """Ask for sleeping waits in the vLLM processes that this process starts."""
    os.environ[_VARIABLE] = "1"


def register() -> None:
    """Let readers of vLLM's message queue sleep between looks, if this server asked for it."""
    if _VARIABLE not in os.environ:
        return
    from vllm.distributed.device_communicators import shm_broadcast

    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS)
    # The module's own name for it, which its waiting loops look up at each turn.
    vars(shm_broadcast)["sched_yield"] = lambda: time.sleep(_SLEEP_S)

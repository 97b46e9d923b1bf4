"""Set-up of child processes, imports without garbage collection, and what a process has worked."""

import contextlib
import ctypes
import gc
import os
import signal
import time

import setproctitle

_PR_SET_PDEATHSIG = 1
_CPUCLOCK_SCHED = 2  # the clock of all threads of a process, with the kernel's precision
# Added to the badness by which the kernel chooses what to kill; the greatest value is 1000.
_OOM_SCORE = "500"

# A process that got less of a processor than this was stopped, or waits for the machine.
_WORKING_SHARE = 0.1
# Exit statuses of a process that others end: an operator, the kernel, its supervisor.
KILLED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, -signal.SIGQUIT)


def start_child(title: str) -> None:
    """Set up this process as a child of the server: name and signals.

    When memory runs out, the kernel kills this process before the server.
    """
    setproctitle.setproctitle(title)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the server decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OOM_SCORE)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the thread that started it ends. If `parent`, the
    process that started it, has ended before, end at once."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------- imports


def import_uncollected() -> None:
    """Switch the garbage collector off until `keep_imported` is called.

    Importing torch, transformers and vLLM makes a million objects that stay. The collector would
    traverse them again and again, for a fifth of the time that the imports take.
    """
    gc.disable()


def keep_imported() -> None:
    """Switch the garbage collector on again. It ignores the objects that exist by now."""
    gc.freeze()
    gc.enable()


# ---------------------------------------------------------------------- work


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken, in seconds; 0 if it is over."""
    clock = ~pid << 3 | _CPUCLOCK_SCHED  # as `clock_getcpuclockid` of the C library computes it
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def has_worked(pid: int, since_s: float, limit_s: float) -> bool:
    """Whether a process that has reached a time limit of `limit_s` is what took so long. If it has
    hardly worked, it was stopped, or got no processor. `since_s` is what `processor_seconds` was
    at the start."""
    return processor_seconds(pid) - since_s >= limit_s * _WORKING_SHARE


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory: of the control group, if it has one
    with counts, or of the machine."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError), open(path) as file:
            for line in file:
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0

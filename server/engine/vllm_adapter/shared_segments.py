"""Names and reserves the segments that vLLM's processes create in /dev/shm.

With a name of ours, the next start can remove what a killed server has left. Memory that is
reserved at once cannot be missing later, when writing to it would kill the process (SIGBUS).

A process that cannot start because /dev/shm is too small leaves the reason in a file, which the
server reports. Its traceback, and those of the processes that wait for it, would say less.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

_FOLDER = "/dev/shm"  # noqa: S108 - where segments are
_MIB = 1 << 20
# The standard library's module, with the beginning of all names, which is that of this server.
_module: Any = shared_memory
# The loggers of vLLM that report why a process did not start.
_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


class ReservedMemory(shared_memory.SharedMemory):
    """`SharedMemory` whose memory exists when it has been created.

    Raises:
        OSError: /dev/shm has too little room.
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
        super().__init__(name, create, size)
        if not create:
            return
        segment: Any = self
        try:
            os.posix_fallocate(segment._fd, 0, size)
        except OSError:
            self.close()
            self.unlink()
            raise OSError(_leave_reason(size)) from None


def reason() -> str | None:
    """What a process of this server has left as its reason for not starting."""
    with contextlib.suppress(OSError):
        return _reason_file().read_text()
    return None


def remove_all(prefix: str) -> None:
    """Remove the segments that killed processes have left, by the prefix of `register`. Call it
    while no process of vLLM runs that would have any."""
    for path in Path(_FOLDER).glob(f"{prefix}_*"):
        with contextlib.suppress(OSError):
            segment = shared_memory.SharedMemory(path.name)
            segment.close()
            segment.unlink()  # and the tracker of resources no longer looks for it


def _reason_file() -> Path:
    return Path(tempfile.gettempdir(), f"{_module._SHM_NAME_PREFIX.strip('/')}cannot-start")


def _leave_reason(nbytes: int) -> str:
    found = os.statvfs(_FOLDER)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    text = (
        f"{_FOLDER} has {free // _MIB} MiB free of {total // _MIB} MiB, and vLLM's processes need "
        f"{nbytes // _MIB} MiB more there; enlarge it (docker --shm-size, shm_size, a memory "
        "volume)"
    )
    with contextlib.suppress(OSError):  # that disk is full, too
        _reason_file().write_text(text)
    return text


def register(prefix: str) -> None:
    """Create segments with names that begin with `prefix`, and reserved; leave a reason if there is
    no room for one, instead of logging a traceback."""
    from vllm.distributed.device_communicators import shm_broadcast

    _module._SHM_NAME_PREFIX = f"/{prefix}_"
    _module.SharedMemory = ReservedMemory
    if shm_broadcast.check_shm_free_space.__module__ == shm_broadcast.__name__:
        vars(shm_broadcast)["check_shm_free_space"] = _checked(shm_broadcast.check_shm_free_space)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_has_no_reason)


def _checked(check: Callable[..., None]) -> Callable[..., None]:
    """vLLM's check for room before it creates a segment, with a reason."""

    def checked(required_bytes: int, *args: Any, **options: Any) -> None:
        try:
            check(required_bytes, *args, **options)
        except RuntimeError:
            if options.get("allocation_name") == "Engram tables":
                raise  # vLLM goes on without them
            raise OSError(_leave_reason(required_bytes)) from None

    return checked


def _has_no_reason(record: logging.LogRecord) -> bool:
    """Whether to log a record: not the traceback of an error whose reason the server reports."""
    return not record.exc_info or reason() is None

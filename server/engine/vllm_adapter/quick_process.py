"""A process that imports without garbage collection."""

import contextlib
import os
import sys
from multiprocessing.context import SpawnProcess
from typing import Any

from server.engine.vllm_adapter import shared_segments
from server.workers.process import import_uncollected, keep_imported


class QuickProcess(SpawnProcess):
    """A spawned process. What it runs is imported when its attributes are unpickled, which is after
    `_unpickled`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (), self.__dict__

    def run(self) -> None:
        keep_imported()
        # A terminal's Ctrl-C would end it, but running requests may finish.
        with contextlib.suppress(OSError):  # it leads its session
            os.setpgrp()
        try:
            super().run()
        except Exception:
            if shared_segments.reason() is None:
                raise
            sys.exit(1)  # without a traceback: the server reports the reason


def _unpickled() -> QuickProcess:
    import_uncollected()
    return QuickProcess.__new__(QuickProcess)

"""A process that imports without garbage collection."""

from multiprocessing.context import SpawnProcess
from typing import Any

from server.workers.process import import_uncollected, keep_imported


class QuickProcess(SpawnProcess):
    """A spawned process. What it runs is imported when its attributes are unpickled, which is after
    `_unpickled`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (), self.__dict__

    def run(self) -> None:
        keep_imported()
        super().run()


def _unpickled() -> QuickProcess:
    import_uncollected()
    return QuickProcess.__new__(QuickProcess)

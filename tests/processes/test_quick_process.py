"""A process that imports without garbage collection collects garbage when it runs."""

import gc
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from server.engine.vllm_adapter.quick_process import QuickProcess


class Argument:
    """Notes whether the garbage collector was on when it was unpickled."""

    collected: bool

    def __setstate__(self, state: Any) -> None:
        self.collected = gc.isenabled()

    def __getstate__(self) -> dict[str, bool]:
        return {"kept": True}


def report(argument: Argument, results: Connection) -> None:
    results.send((argument.collected, gc.isenabled(), gc.get_freeze_count() > 0))


def test_a_process_imports_without_garbage_collection() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = QuickProcess(target=report, args=(Argument(), theirs))
    process.start()
    theirs.close()
    while_importing, while_running, ignores_imported = ours.recv()
    process.join()
    assert process.exitcode == 0
    assert not while_importing
    assert while_running
    assert ignores_imported

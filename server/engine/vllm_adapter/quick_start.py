"""How vLLM starts its processes.

vLLM starts its engine core, and with most executors a worker for each device, as new processes,
which import torch, transformers and vLLM again. Here they do so without garbage collection, and the
engine core may be a fork that has imported them already.
"""

import sys
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from server.engine.vllm_adapter.core_fork import CoreProcess
from server.engine.vllm_adapter.quick_process import QuickProcess

# The modules of vLLM that start engine cores and workers.
_PROCESSES: dict[str, type[SpawnProcess]] = {
    "vllm.v1.engine.utils": CoreProcess,
    "vllm.v1.executor.multiproc_executor": QuickProcess,
}


def register() -> None:
    """Start the processes of those modules that are imported in this way, unless vLLM forks."""
    for name, process in _PROCESSES.items():
        if (module := sys.modules.get(name)) is not None:
            vars(module)["get_mp_context"] = _get_context(process)


def _get_context(process: type[SpawnProcess]) -> Any:
    from vllm.utils.system_utils import get_mp_context

    def get_context() -> Any:
        context = get_mp_context()  # type: ignore[no-untyped-call]
        if context.get_start_method() != "spawn":
            return context
        quick = SpawnContext()
        vars(quick)["Process"] = process
        return quick

    return get_context

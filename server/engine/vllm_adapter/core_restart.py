"""Starts vLLM's engine core again in the place of one that has died or hangs.

The `AsyncLLM` stays, and with it all that was made for it: the renderer, the serving classes of the
routes, the metrics. It gets the client of another core. What the dead core knew is gone: requests,
prefixes, features of images, LoRA adapters (which vLLM loads again when they are used), and weights
that were changed while the server ran.
"""

import asyncio
import contextlib
import copy
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.network_utils import get_open_zmq_ipc_path
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.utils import EngineZmqAddresses, launch_core_engines
from vllm.v1.executor import Executor

from server.concurrency import cancel
from server.engine.vllm_adapter import plugin, shared_segments
from server.engine.vllm_adapter.stall import fail_requests
from server.errors import CannotStart

FLAG = "--restart-engine"
# How long a device may take to free the memory of a process that was killed.
_END_S = 30.0


def adapt(config: VllmConfig, front_ends: int) -> None:
    """Let the engine be one that can be started again.

    Raises:
        CannotStart: it cannot.
    """
    if (why := _obstacle(config, front_ends)) is not None:
        raise CannotStart(f"{FLAG}: not with {why}")
    # A fork of a process whose threads run may wait for a lock that one of them had.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def _obstacle(config: VllmConfig, front_ends: int) -> str | None:
    parallel, options = config.parallel_config, config.model_config.multimodal_config
    if front_ends > 1:
        return "several front ends (--api-server-count)"
    if parallel.data_parallel_size > 1:
        return "several engines (--data-parallel-size)"
    if parallel.nnodes > 1 or parallel.distributed_executor_backend in ("ray", "external_launcher"):
        return "an engine that runs on several machines"
    if options is not None and options.mm_processor_cache_type == "shm":
        return "--mm-processor-cache-type shm"
    if options is not None and options.mm_tensor_ipc == "torch_shm":
        return "--mm-tensor-ipc torch_shm"
    return None


class CoreStarter:
    """Starts the core of `engine` again."""

    def __init__(
        self, engine: AsyncLLM, config: VllmConfig, attach: Callable[[AsyncLLM], None]
    ) -> None:
        """`config` is a copy from before the first start, which writes into the engine's. `attach`
        adapts the client of a new core."""
        self._engine = engine
        self._config = config
        self._attach = attach
        core: Any = engine.engine_core
        self._workers = _descendants(core.resources.engine_manager)

    def give_up_core(self) -> None:
        """The core hangs: from now on it counts as dead, and will not come back."""
        core: Any = self._engine.engine_core
        core.resources.engine_dead = True

    async def start_again(self) -> None:
        """End what is left of the dead core, fail its requests, and start another. The engine
        counts as dead until that takes requests.

        Raises:
            RuntimeError: the new core cannot start.
        """
        await self._clear_away()
        core = await self._launched(copy.deepcopy(self._config))
        engine: Any = self._engine
        # From here on without an await: a request finds the engine dead, or whole.
        engine.renderer.clear_mm_cache()  # the new core has no features
        engine.engine_core = core
        self._attach(self._engine)
        engine.output_handler = None
        engine._run_output_handler()

    async def _clear_away(self) -> None:
        self.give_up_core()
        core: Any = self._engine.engine_core
        if (handler := self._engine.output_handler) is not None:
            await cancel(handler)  # later, it would fail the requests of the next core
        for answer in core.utility_results.values():
            if not answer.done():
                answer.set_exception(EngineDeadError())
        await fail_requests(self._engine, EngineDeadError)
        await asyncio.to_thread(core.shutdown, 0.0)
        await asyncio.to_thread(_end, self._workers)
        for process in core.resources.engine_manager.processes:
            await asyncio.to_thread(process.join, _END_S)
        if (prefix := plugin.asked().segments) is not None:
            shared_segments.remove_all(prefix)

    async def _launched(self, config: VllmConfig) -> Any:
        """The client of a new core, when that is ready."""
        executor, log_stats = Executor.get_class(config), self._engine.log_stats
        inputs, outputs = get_open_zmq_ipc_path(), get_open_zmq_ipc_path()
        launching = launch_core_engines(
            config, executor, log_stats, EngineZmqAddresses([inputs], [outputs])
        )
        # The process is made by this thread, the main one: it ends with the thread that made it.
        manager: Any = launching.__enter__().engine_manager
        waiting = asyncio.create_task(asyncio.to_thread(launching.__exit__, None, None, None))
        try:
            await asyncio.shield(waiting)
            core: Any = EngineCoreClient.make_async_mp_client(
                config,
                executor,
                log_stats,
                client_addresses={"input_address": inputs, "output_address": outputs},
            )
        except BaseException:
            await asyncio.shield(asyncio.to_thread(manager.shutdown, 0.0))  # this ends the wait
            with contextlib.suppress(RuntimeError):
                await asyncio.shield(waiting)
            raise
        self._workers = _descendants(manager)
        core.resources.engine_manager = manager
        core.start_engine_core_monitor()
        return core


def _descendants(manager: Any) -> list[int]:
    """The processes that the cores of `manager` have started, and those that these have, as file
    descriptors that become readable when the process has ended."""
    found: list[int] = []
    parents = [process.pid for process in manager.processes]
    while parents:
        for tasks in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in map(int, tasks.read_text().split()):
                    found.append(os.pidfd_open(child))
                    parents.append(child)
    return found


def _end(processes: list[int]) -> None:
    """Kill processes, and wait until they have ended and their memory is free."""
    until = time.monotonic() + _END_S
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], max(0.0, until - time.monotonic()))
        os.close(process)
    processes.clear()

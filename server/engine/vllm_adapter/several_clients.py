"""Several front ends as clients of the same engines.

vLLM's engine has a socket for each client, and answers each request where it came from. What it
lacks is added here, and in the engines by `client_caches`:

- With several clients, vLLM gives up the cache by which an engine keeps the features of images
  (`processor_only`), and each repeat sends them again. One engine has such a cache for each client
  instead, with its part of the memory: the messages of a client arrive in order, so the two halves
  agree as they do with a single one. With several engines vLLM itself has no such cache.
- A client that was killed leaves requests in the engine, and may be started again with the same
  sockets. The engine says hello to a client only once, so the next one is told what it said.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import zmq
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.engine import core_client
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server.errors import CannotStart
from server.front_ends import FLAG, FrontEnd, addresses

_ANSWER_S = 1.0
_ATTEMPTS = 120


def adapt(config: VllmConfig, clients: int) -> None:
    """Divide the cache of features and the limits of vLLM's queue between `clients`, in each
    process alike.

    Raises:
        CannotStart: the configuration allows one client only.
    """
    if (why := _obstacle(config)) is not None:
        raise CannotStart(f"{FLAG} {clients}: not with {why}")
    scheduler = config.scheduler_config
    for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
        if (most := getattr(scheduler, name)) is not None:
            setattr(scheduler, name, max(1, most // clients))
    options = config.model_config.multimodal_config
    if options is not None:
        options.mm_processor_cache_gb /= clients
        options.mm_processor_cache_type = "lru"  # that in shared memory has one writer


def _obstacle(config: VllmConfig) -> str | None:
    parallel, options = config.parallel_config, config.model_config.multimodal_config
    if parallel.nnodes > 1 or parallel.data_parallel_size_local != parallel.data_parallel_size:
        return "engines on several machines"
    if parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb:
        return "load balancing between servers (--data-parallel-rank, --data-parallel-hybrid-lb)"
    if parallel.data_parallel_backend == "ray":
        return "--data-parallel-backend ray"
    if parallel.enable_elastic_ep:
        return "--enable-elastic-ep"
    if parallel.enable_fault_tolerance:
        return "--enable-fault-tolerance"
    if options is not None and options.mm_tensor_ipc == "torch_shm":
        return "--mm-tensor-ipc torch_shm"
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    if envs.VLLM_ENABLE_RESPONSES_API_STORE:
        return "VLLM_ENABLE_RESPONSES_API_STORE: each front end would store its own responses"
    return None


# ---------------------------------------------------------------------- in a front end


def options(mine: FrontEnd) -> dict[str, Any]:
    """The arguments by which vLLM's engine client takes the engines as they are."""
    inputs, outputs = addresses(mine.folder, mine.count)
    return {
        "client_addresses": {
            "input_address": inputs[mine.index],
            "output_address": outputs[mine.index],
            "stats_update_address": mine.engines.stats,
        },
        "client_count": mine.count,
        "client_index": mine.index,
    }


_heard: dict[bytes, bytes] = {}


def heard() -> dict[bytes, bytes]:
    """What each engine has said first: {identity: message}."""
    return dict(_heard)


@contextmanager
def reaching(mine: FrontEnd | None) -> Iterator[None]:
    """Let the engine client that is made in the body note what the engines say first, or take what
    they said before. Without `mine`, nothing changes."""
    if mine is None:
        yield
        return
    _heard.update(mine.engines.hello)
    _tolerate_unasked_results()
    module = vars(core_client)
    module["zmq"] = _Zmq(_Greetings(mine.engines.hello))
    try:
        yield
    finally:
        module["zmq"] = zmq


class _Zmq:
    """Stands in for the module of that name; only the way to wait for the engines differs."""

    def __init__(self, socket: Any) -> None:
        self.Socket = socket

    def __getattr__(self, name: str) -> Any:
        return getattr(zmq, name)


class _Greetings:
    """Makes what stands in for a socket on which the engines say hello."""

    def __init__(self, known: dict[bytes, bytes]) -> None:
        self._known = known

    def shadow(self, socket: Any) -> "_Greeted":
        return _Greeted(zmq.Socket.shadow(socket), self._known)


class _Greeted:
    def __init__(self, socket: "zmq.Socket[bytes]", known: dict[bytes, bytes]) -> None:
        self._socket = socket
        self._left = list(known.items())

    def poll(self, timeout: int) -> int:
        return 1 if self._left else self._socket.poll(timeout)

    def recv_multipart(self) -> Sequence[bytes]:
        if self._left:
            return self._left.pop()
        identity, message = self._socket.recv_multipart()
        _heard[identity] = message
        return identity, message


def _tolerate_unasked_results() -> None:
    """Engines may still answer what a client asked that was killed."""
    client: Any = core_client.AsyncMPClient
    ensure = client._ensure_output_queue_task

    def ensure_output_queue_task(self: Any) -> None:
        if self.resources.output_queue_task is None:
            self.utility_results = _Results(self.utility_results)
        ensure(self)

    client._ensure_output_queue_task = ensure_output_queue_task


class _Results(dict[int, Any]):
    """The futures of calls by id."""

    def pop(self, key: int, *default: Any) -> Any:
        return super().pop(key, _Nobody())


class _Nobody:
    """Waits for no result."""

    def set_result(self, _: object) -> None: ...

    def set_exception(self, _: object) -> None: ...


def note_statistics(engine: AsyncLLM) -> Callable[[], dict[str, float]]:
    """Note when statistics of the engines come to this client, of which each goes to one only; the
    result gives the time of the last, by the engine's index, on the monotonic clock."""
    updated: dict[str, float] = {}
    loggers: Any = engine.logger_manager
    if loggers is not None:
        record = loggers.record

        def noting(scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                updated[str(kwargs.get("engine_idx") or 0)] = time.monotonic()
            record(scheduler_stats, *args, **kwargs)

        loggers.record = noting
    return lambda: dict(updated)


async def _answer(engine: AsyncLLM) -> None:
    """Wait until the engines answer a question; they may be busy for longer than `_ANSWER_S`, and
    what is sent before they have connected again is lost.

    Raises:
        CannotStart
    """
    asked: set[asyncio.Task[bool]] = set()
    try:
        for _ in range(_ATTEMPTS):
            asked.add(asyncio.create_task(engine.is_sleeping()))
            answered, _ = await asyncio.wait(
                asked, timeout=_ANSWER_S, return_when=asyncio.FIRST_COMPLETED
            )
            for each in answered:
                each.result()
            if answered:
                return
    except EngineDeadError:
        raise CannotStart("the engine has died") from None
    finally:
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    raise CannotStart("the engine does not answer")


async def join(engine: AsyncLLM, mine: FrontEnd) -> None:
    """Become the client that the engines know, and drop what another one has left under the same
    index. From now on, the end of the engines is noticed.

    Raises:
        CannotStart: an engine does not answer.
    """
    core: Any = engine.engine_core
    loop = asyncio.get_running_loop()

    def lose() -> None:
        loop.remove_reader(mine.engines.alive)
        if not core.resources.engine_dead:
            core.resources.engine_dead = True
            core.shutdown()

    loop.add_reader(mine.engines.alive, lose)
    await _answer(engine)
    await core.call_utility_all_async("forget_client", mine.index)
    core.reset_mm_cache_async = lambda: core.call_utility_all_async("forget_items", mine.index)

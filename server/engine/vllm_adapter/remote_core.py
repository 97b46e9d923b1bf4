"""The front's end of engines in other processes, maybe on other machines: `core_host` is theirs.

vLLM's front end and its engine core talk by messages. Here these messages pass through a
`Transport` instead of a socket, each request on a stream of its own: a request leaves as the bytes
that vLLM would send, and the outputs come back as the bytes that its engine core sends. What vLLM's
front end does stays here: it renders, detokenizes, and looks for stop strings.

The engines keep no features of images (no vLLM cache has several readers), so each request carries
those of its images. The front keeps features to send them again without computing them, and tells
the transport which ones these are (`item_frames`).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from types import SimpleNamespace
from typing import Any, Protocol

import msgspec
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient, MPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.serial_utils import MsgpackDecoder

from server.engine.vllm_adapter.item_frames import ItemFrames
from server.engine.vllm_adapter.stall import fail_request
from server.errors import CannotStart

log = logging.getLogger("saccade.engine")

_POLL_S = 0.2

Frames = Sequence[Any]
"""A message: buffers, the first of which says how to read the others. To an engine, some of them
may be in `Features`."""


class Hello(msgspec.Struct, frozen=True):
    """What the front must know of the engines before the first request: vLLM's message at the end
    of their start, and the tasks that they support."""

    ready: bytes
    tasks: tuple[str, ...]


class EngineLost(EngineDeadError):
    """The engine of a request has ended, or there is none. A subclass, since vLLM passes only such
    an error on as it is."""

    def __init__(self) -> None:
        # The beginning of the message by which `http/errors.py` knows the error.
        Exception.__init__(self, "EngineCore is gone")


class Transport(Protocol):
    """How messages reach the engines."""

    def count(self) -> int:
        """How many engines take requests now."""

    def send(self, request_id: str, frames: Frames, key: str) -> AsyncGenerator[list[Frames], None]:
        """Send a request to one engine, and yield its messages, several at a time. `key` is equal
        for requests that should reach the same engine; "": any. Closing it ends the request.

        Raises:
            EngineLost: the engine has ended.
        """

    async def ask_all(self, method: str, *args: Any) -> list[Any]:
        """Call vLLM's utility `method` in all engines."""


class RemoteEngines(msgspec.Struct, frozen=True):
    """Engines that other processes have started.

    Attributes:
        most: how many there may be, for all fronts together.
        fronts: how many fronts share them at least.
    """

    transport: Transport
    hello: Hello
    most: int = 1
    fronts: int = 1


def adapt_front(config: VllmConfig) -> None:
    """Let a front keep the features of images itself: vLLM does so where it has several API
    processes.

    Raises:
        CannotStart: the configuration is not possible with remote engines.
    """
    check(config)
    config.parallel_config._api_process_count = 2


def adapt_engine(config: VllmConfig) -> None:
    """Let an engine keep no features: fronts send them with each request.

    Raises:
        CannotStart: the configuration is not possible with remote engines.
    """
    check(config)
    if (options := config.model_config.multimodal_config) is not None:
        options.mm_processor_cache_gb = 0


def check(config: VllmConfig) -> None:
    """Raises CannotStart if the configuration is not possible with remote engines."""
    if (why := _obstacle(config)) is not None:
        raise CannotStart(f"not possible on Ray Serve: {why}")


def _obstacle(config: VllmConfig) -> str | None:
    options = config.model_config.multimodal_config
    if config.parallel_config.data_parallel_size > 1:
        return "--data-parallel-size; use --engine-replicas instead"
    if options is not None and options.mm_tensor_ipc == "torch_shm":
        return "--mm-tensor-ipc torch_shm"
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    if envs.VLLM_ENABLE_RESPONSES_API_STORE:
        return "VLLM_ENABLE_RESPONSES_API_STORE: each front would store its own responses"
    return None


@contextmanager
def reaching(remote: RemoteEngines | None) -> Iterator[None]:
    """Let the engine that is made in the body reach `remote`, if there are any."""
    if remote is None:
        yield
        return
    known = remote

    def make(vllm_config: VllmConfig, renderer: Any = None, **_: Any) -> RemoteCore:
        return RemoteCore(vllm_config, known, renderer)

    client: Any = EngineCoreClient
    before = client.make_async_mp_client
    client.make_async_mp_client = staticmethod(make)
    try:
        yield
    finally:
        client.make_async_mp_client = staticmethod(before)


class RemoteCore(EngineCoreClient):
    """Takes the place of vLLM's client of an engine core.

    Attributes:
        engine: the `AsyncLLM` whose requests fail when their engine ends.
    """

    engine: AsyncLLM | None = None

    def __init__(self, vllm_config: VllmConfig, remote: RemoteEngines, renderer: Any) -> None:
        self.vllm_config = vllm_config
        self.resources = SimpleNamespace(engine_dead=False)
        self.engine_ranks_managed = [0]
        self.encoder = ItemFrames(vllm_config.model_config)
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._remote = remote
        self._transport = remote.transport
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._following: dict[str, asyncio.Task[None]] = {}
        # Of vLLM's client, for what it notes of the engine's start.
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources: dict[int, Any] = {}
        self.stats_update_address: str | None = None
        apply: Any = MPClient._apply_ready_response
        apply(self, remote.hello.ready)
        if renderer is not None:
            renderer.start_mm_warmup_in_background()

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the requests that run."""
        self.resources.engine_dead = True
        for task in self._following.values():
            task.cancel()

    # ------------------------------------------------------------------ requests

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Raises EngineLost if there is no engine."""
        if not self._transport.count():
            raise EngineLost
        frames = self.encoder.frames(request)
        following = self._follow(request.request_id, frames, key_of(request))
        # Answers to one HTTP request are requests of their own: a transport may find the id of that
        # one in the context, and take two for the same.
        task = asyncio.create_task(following, context=Context())
        self._following[request.request_id] = task

    async def _follow(self, request_id: str, frames: Frames, key: str) -> None:
        """Take what the engine says of a request, until it has ended."""
        stream = self._transport.send(request_id, frames, key)
        del frames  # features need memory only until they are sent
        over = False
        try:
            async for messages in stream:
                for message in messages:
                    outputs = self._decoder.decode(message)
                    over = over or any(output.finished for output in outputs.outputs)
                    self._outputs.put_nowait(outputs)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            log.warning("the engine has dropped request %s", request_id)
        except EngineLost:
            log.warning("the engine of request %s has ended", request_id)
        except Exception:
            log.exception("the engine of request %s failed", request_id)
        finally:
            self._following.pop(request_id, None)
            await stream.aclose()
        if not over and self.engine is not None:
            await fail_request(self.engine, request_id, EngineLost())

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if (task := self._following.pop(request_id, None)) is not None:
                task.cancel()

    # ------------------------------------------------------------------ the engines

    async def get_supported_tasks_async(self) -> Any:
        return self._remote.hello.tasks

    async def is_sleeping_async(self) -> bool:
        """The answer comes when there is an engine."""
        while not self._transport.count():  # noqa: ASYNC110 - Ray Serve offers no event
            await asyncio.sleep(_POLL_S)
        return False

    async def reset_mm_cache_async(self) -> None:
        """The engines have no features."""

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        args = (reset_running_requests, reset_connector)
        return all(await self._transport.ask_all("reset_prefix_cache", *args))

    async def reset_encoder_cache_async(self) -> None:
        await self._transport.ask_all("reset_encoder_cache")

    async def add_lora_async(self, lora_request: Any) -> bool:
        return all(await self._transport.ask_all("add_lora", lora_request))

    def dp_engines_running(self) -> bool:
        return bool(self._following)


def key_of(request: EngineCoreRequest) -> str:
    """What is equal for requests that share their first image: its name, with the group of API
    keys; "" without images."""
    features = request.mm_features or ()
    first = min(features, key=lambda each: each.mm_position.offset, default=None)
    return "" if first is None else first.mm_hash or first.identifier


def join(engine: AsyncLLM) -> None:
    """Let the requests of `engine` fail when theirs ends, if it is one of other processes."""
    core: Any = engine.engine_core
    if isinstance(core, RemoteCore):
        core.engine = engine

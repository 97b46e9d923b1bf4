"""An engine whose requests come from fronts in other processes: `remote_core` is their end.

It passes messages on as they are. Only what the engine says is read, to know which request each
output belongs to.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient, MPClient
from vllm.v1.executor import Executor
from vllm.v1.serial_utils import MsgpackEncoder

from server.concurrency import cancel
from server.engine.vllm_adapter.remote_core import EngineLost, Frames, Hello

log = logging.getLogger("saccade.engine")


class CoreHost:
    """Starts the engine when it is made, which blocks. Use it inside `async with`.

    Attributes:
        is_dead: the engine has died.
        total: how many requests the engine has had.
    """

    def __init__(self, config: VllmConfig, *, log_stats: bool) -> None:
        ready: list[bytes] = []
        with _noting_ready(ready):
            self._core: AsyncMPClient = EngineCoreClient.make_async_mp_client(
                config, Executor.get_class(config), log_stats
            )
        (self._ready,) = ready
        self._shutdown_s = config.shutdown_timeout
        self._encoder = MsgpackEncoder()
        self._streams: dict[str, asyncio.Queue[Frames | None]] = {}
        self._tasks: tuple[str, ...] = ()
        self._reading: asyncio.Task[None] | None = None
        self.is_dead = False
        self.total = 0

    async def __aenter__(self) -> "CoreHost":
        self._tasks = tuple(await self._core.get_supported_tasks_async())
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reading is not None
        await cancel(self._reading)
        self._core.shutdown(timeout=self._shutdown_s)

    @property
    def hello(self) -> Hello:
        return Hello(self._ready, self._tasks)

    def running(self) -> int:
        """How many requests the engine has."""
        return len(self._streams)

    async def run(self, request_id: str, frames: Frames) -> AsyncGenerator[list[Frames], None]:
        """Give a request to the engine, and yield what it says of it: the messages that have come
        since the last time. Closing it aborts the request.

        Raises:
            EngineLost: the engine has died.
        """
        if self.is_dead:
            raise EngineLost
        self.total += 1
        arriving = self._streams[request_id] = asyncio.Queue()
        try:
            parts = [memoryview(frame) for frame in frames]
            message: Any = (EngineCoreRequestType.ADD.value, *parts)
            await self._core._send_input_message(message, self._core.core_engine)
            del message, parts, frames  # features need memory only until they are sent
            while True:
                found = [await arriving.get()]
                while not arriving.empty():
                    found.append(arriving.get_nowait())
                if messages := [each for each in found if each is not None]:
                    yield messages
                if found[-1] is None:
                    break
            if self.is_dead:
                raise EngineLost
        finally:
            if self._streams.pop(request_id, None) is not None and not self.is_dead:
                await self._core.abort_requests_async([request_id])

    async def is_sleeping(self) -> bool:
        """The engine's answer is a sign of life."""
        return await self._core.is_sleeping_async()

    async def ask(self, method: str, *args: Any) -> Any:
        """Call vLLM's utility `method`."""
        return await self._core.call_utility_async(method, *args)

    def end_requests(self) -> None:
        """End all streams, for instance because the engine does not answer."""
        for stream in self._streams.values():
            stream.put_nowait(None)

    async def _read(self) -> None:
        """Take what the engine says, until it dies."""
        try:
            while True:
                self._sort(await self._core.get_output_async())
        except Exception as error:
            log.error("the engine has died: %r", error)
            self.is_dead = True
            self.end_requests()

    def _sort(self, outputs: EngineCoreOutputs) -> None:
        """Pass each output on to the stream of its request. The statistics of the engine go along
        with the first one, since they count what has happened since the last time."""
        stats = outputs.scheduler_stats
        for output in outputs.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            message = EngineCoreOutputs(
                outputs=[output],
                scheduler_stats=stats,
                timestamp=outputs.timestamp,
                weight_version=outputs.weight_version,
            )
            stats = None
            frames: Any = self._encoder.encode(message)
            stream.put_nowait([bytes(frame) for frame in frames])
            if output.finished:
                del self._streams[output.request_id]
                stream.put_nowait(None)


@contextlib.contextmanager
def _noting_ready(payloads: list[bytes]) -> Iterator[None]:
    """Append what each engine says at the end of its start to `payloads`."""
    client: Any = MPClient
    apply = client._apply_ready_response

    def noting(self: Any, payload: bytes) -> None:
        payloads.append(bytes(payload))
        apply(self, payload)

    client._apply_ready_response = noting
    try:
        yield
    finally:
        client._apply_ready_response = apply

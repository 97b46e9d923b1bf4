"""The way from a front to the engines: a handle of Ray Serve."""

from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from server.engine.vllm_adapter.remote_core import EngineLost, Frames, Hello
from server.scale import known
from server.scale.features import Sender

# Failures of a call that concern the engine, and not the request.
_LOST = (RayError, RayServeException)


class Handles:
    """A `Transport` to the replicas of one deployment of `Engine`. `most_bytes`: how much of the
    node's object store features may take that were sent."""

    def __init__(self, engines: DeploymentHandle[Any], most_bytes: int) -> None:
        self._sender = Sender(most_bytes)
        self._engines: Any = engines
        self._streams: Any = engines.options(stream=True)

    async def hello(self) -> Hello:
        """Waits until an engine has started."""
        hello: Hello = await self._engines.hello.remote()
        return hello

    def count(self) -> int:
        return known.replicas()

    async def send(
        self, request_id: str, frames: Frames, key: str
    ) -> AsyncGenerator[list[Frames], None]:
        arguments = await self._sender.arguments(frames)
        response = self._streams.run.remote(request_id, arguments, key=key)
        del arguments, frames
        has_ended = False
        try:
            async for messages in response:
                yield messages
            has_ended = True
        except _LOST as error:
            has_ended = True
            raise EngineLost from error
        finally:
            if not has_ended:
                response.cancel()

    async def ask_all(self, method: str, *args: Any) -> list[Any]:
        """Raises EngineLost if an engine does not answer."""
        try:
            answers: list[Any] = await self._engines.broadcast("ask", method, args).results_async()
        except _LOST as error:
            raise EngineLost from error
        return answers

"""The way from a front to the engines: a handle of Ray Serve."""

from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from server.engine.vllm_adapter.remote_core import EngineLost, Frames, Hello
from server.scale import known

# Failures of a call that concern the engine, and not the request.
_LOST = (RayError, RayServeException)


class Handles:
    """A `Transport` to the replicas of one deployment of `Engine`."""

    def __init__(self, engines: DeploymentHandle[Any]) -> None:
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
        # Ray passes arrays through its object store without a copy for the reader.
        arrays = [np.frombuffer(frame, np.uint8) for frame in frames]
        response = self._streams.run.remote(request_id, arrays, key=key)
        del arrays, frames
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

"""An engine as a replica on Ray Serve."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

from server.engine import launch
from server.engine.arguments import parse
from server.engine.heartbeat import Heartbeat
from server.engine.vllm_adapter import plugin, remote_core
from server.engine.vllm_adapter.core_host import CoreHost
from server.engine.vllm_adapter.remote_core import Frames, Hello
from server.scale.features import received
from server.scratch import Scratch

log = logging.getLogger("saccade.engine")

_CHECK_S = 0.5
# For the requests of an engine that has died to send their error.
_LAST_WORDS_S = 1.0


class Load(msgspec.Struct, frozen=True):
    """The process of a replica, the requests that it has, and those that it has had."""

    pid: int
    running: int
    total: int


class Engine:
    """One replica: vLLM's engine core and workers, without HTTP and without images."""

    async def __init__(self, argv: Sequence[str]) -> None:  # type: ignore[misc] # Serve awaits it
        """`argv`: the flags of `saccade deploy`. Blocks until the engine has started."""
        scratch = Scratch()
        plugin.ask(segments=scratch.id, die_with_parent=True, return_memory=True, quick_start=True)
        args, settings = parse(argv, "deploy")
        prepared = launch.configured(args, settings, 1)
        remote_core.adapt_engine(prepared.config)
        self._stack = contextlib.AsyncExitStack()
        embeddings = launch.add_embedding_cache(prepared, settings)
        if embeddings is not None:
            await self._stack.enter_async_context(embeddings)
        log_stats = not prepared.engine_args.disable_log_stats
        host = CoreHost(prepared.config, log_stats=log_stats)
        self._host = await self._stack.enter_async_context(host)
        self._heartbeat = await self._stack.enter_async_context(
            Heartbeat(host.is_sleeping, settings.http.engine_stall_timeout_s, self._fail)
        )
        self._watching = asyncio.create_task(self._watch())

    async def hello(self) -> Hello:
        """What a front must know before its first request."""
        return self._host.hello

    async def run(
        self, request_id: str, frames: Frames, *, key: str
    ) -> AsyncGenerator[list[Frames], None]:
        """Answer a request; `frames` are a front's `Sender.arguments`, and `key` is for the router.
        See `CoreHost.run`."""
        answers = self._host.run(request_id, await received(frames))
        del frames
        async with contextlib.aclosing(answers) as messages:
            async for found in messages:
                yield found

    async def ask(self, method: str, args: Sequence[Any]) -> Any:
        """Call vLLM's utility `method`."""
        return await self._host.ask(method, *args)

    async def load(self) -> Load:
        """What this replica does, for operators and tests."""
        return Load(os.getpid(), self._host.running(), self._host.total)

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose check fails."""
        if self._host.is_dead or self._heartbeat.stalled:
            raise RuntimeError("the engine has died or does not answer")

    async def __del__(self) -> None:
        self._watching.cancel()
        await self._stack.aclose()

    async def _fail(self) -> None:
        self._host.end_requests()

    async def _watch(self) -> None:
        """End this process when its engine has died. Ray Serve then takes the replica out and
        starts another at once; the health check would need several periods for that."""
        while not self._host.is_dead:  # noqa: ASYNC110 - the engine offers nothing to wait for
            await asyncio.sleep(_CHECK_S)
        await asyncio.sleep(_LAST_WORDS_S)
        os.kill(os.getpid(), signal.SIGKILL)

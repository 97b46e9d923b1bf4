"""A front as a replica on Ray Serve: the HTTP app, without an engine."""

import asyncio
import contextlib
import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, cast

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from server.engine import vllm_http
from server.engine.arguments import parse
from server.engine.vllm_adapter import plugin
from server.engine.vllm_adapter.remote_core import RemoteEngines
from server.http import keys
from server.http.app import batch_runner, build_app, inner_client, observed
from server.parts import running
from server.scale import scaling
from server.scale.entrance import Entrance
from server.scale.features import store_share
from server.scale.handles import Handles
from server.scale.replicas import Replicas, settings_of_front
from server.scratch import Scratch
from server.settings import Settings
from server.workers.pool import ImagePool

log = logging.getLogger("saccade")


class Front:
    """One replica: everything that needs no engine, and the way to the engines."""

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self, argv: Sequence[str], engines: DeploymentHandle[Any]
    ) -> None:
        """`argv`: the flags of `saccade deploy`. Waits until an engine has started."""
        scratch = Scratch()
        plugin.ask(segments=scratch.id, die_with_parent=True)
        args, settings = parse(argv, "deploy")
        settings = settings_of_front(settings)
        wanted = Replicas.of(settings.deploy)
        transport = Handles(engines, store_share(wanted.most_fronts))
        remote = RemoteEngines(
            transport, await transport.hello(), most=wanted.most_engines, fronts=wanted.fronts
        )
        self._pool: ImagePool | None = None
        self._stop = asyncio.Event()
        started: asyncio.Future[ASGIApp] = asyncio.get_running_loop().create_future()
        # What is entered there must be left in the same task.
        self._running = asyncio.create_task(self._run(args, settings, remote, started))
        waiting: list[asyncio.Future[Any]] = [started, self._running]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()
        self._app = await started

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose check fails. The engines have checks
        of their own."""
        if self._running.done() or (self._pool is not None and not self._pool.ready):
            raise RuntimeError("no image worker is available")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve."""
        return {scaling.IMAGES: self._pool.load if self._pool is not None else 0.0}

    async def __del__(self) -> None:
        self._stop.set()
        await asyncio.wait([self._running])

    async def _run(
        self,
        args: Namespace,
        settings: Settings,
        remote: RemoteEngines,
        started: "asyncio.Future[ASGIApp]",
    ) -> None:
        async with running(args, settings, _report, remote=remote) as parts:
            self._pool = parts.pool
            keeps_responses = bool(vllm_http.paths_that_keep_bodies())
            ring = keys.key_ring(
                settings.access, vllm_http.api_keys(args), keeps_responses=keeps_responses
            )
            built = await build_app(args, settings, parts, ring)
            outer = observed(built, args, settings)
            client = inner_client(outer, args, settings, parts)
            runner = batch_runner(built, client, settings.batches, parts, ring)
            async with runner or contextlib.nullcontext() as batches:
                built.state.batches = batches
                started.set_result(Entrance(cast(ASGIApp, outer)))
                await self._stop.wait()
                built.state.draining = True
                outer.flush()


def _report(text: str) -> None:
    log.info("%s", text)

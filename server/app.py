"""From arguments to a running server.

arguments -> parts (engine, image pool, media loader) -> http.app -> http.server
"""

import asyncio
import contextlib
import functools
import socket
from argparse import Namespace
from collections.abc import Callable
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from server import shares
from server.concurrency import share_memory
from server.engine import vllm_http
from server.engine.vllm_adapter import plugin, several_clients
from server.front_ends import FrontEnd
from server.http import keys
from server.http import server as http_server
from server.http.app import (
    Parts,
    batch_runner,
    build_app,
    inner_client,
    model_name,
    observed,
)
from server.http.observe import Observed
from server.parts import running
from server.replica import Replica
from server.settings import Settings
from server.telemetry import tracing
from server.upload_folder import Report
from server.workers.memory import keep_freed_memory_in_one_heap

# Time limit for sending the last traces at shutdown.
_TRACES_TIMEOUT_S = 5.0


async def run(
    args: Namespace, settings: Settings, report: Report, mine: FrontEnd | None = None
) -> int:
    """Serve until a signal or the engine's death; returns the exit status. `mine` is this process,
    if it is one of several front ends."""
    keep_freed_memory_in_one_heap()
    if mine is None:
        plugin.ask(die_with_parent=True, return_memory=True, quick_start=True)
    else:
        share_memory(mine.count)
        settings = shares.part_of(settings, mine)
    keeps_responses = bool(vllm_http.paths_that_keep_bodies())
    key_ring = keys.key_ring(
        settings.access, vllm_http.api_keys(args), keeps_responses=keeps_responses
    )
    if mine is None:
        address, sock = vllm_http.setup_server(args, reuse_port=False)
    else:
        vllm_http.join_server(args)
        address, sock = mine.engines.address, mine.listening
    with sock:
        async with running(args, settings, report, mine) as parts:
            app = await build_app(args, settings, parts, key_ring)
            outer = observed(app, args, settings)
            config = _http_config(outer, args, settings, parts)
            server = http_server.Server(config, mine)
            app.state.server = server
            is_only = Replica.current() is None
            said = _invitation(args, address, sock) if is_only else "ready"
            if mine is None:
                server.on_started = functools.partial(report, said)
            else:
                server.on_announced = functools.partial(report, said)
                server.on_started = functools.partial(_say_ready, mine)
            refresher = None
            if args.enable_ssl_refresh:
                refresher = vllm_http.refresh_certificates(config, args)
            try:
                client = inner_client(outer, args, settings, parts)
                runner = batch_runner(app, client, settings.batches, parts, key_ring)
                async with contextlib.AsyncExitStack() as stack:
                    if runner is not None:
                        app.state.batches = await stack.enter_async_context(runner)
                    if parts.peers is not None:
                        caches = parts.caches, parts.fetch_cache
                        answering = parts.peers.answering(outer, *caches, server)
                        await stack.enter_async_context(answering)
                    delay_s, link = settings.http.drain_delay_s, mine.link if mine else None
                    return await http_server.serve(server, sock, parts.engine, app, delay_s, link)
            finally:
                if refresher is not None:
                    refresher.stop()
                outer.flush()
                if args.otlp_traces_endpoint is not None:
                    await asyncio.to_thread(tracing.close, _TRACES_TIMEOUT_S)


def _http_config(
    outer: Observed, args: Namespace, settings: Settings, parts: Parts
) -> uvicorn.Config:
    """The settings of the HTTP server. Requests that another front end answers pass `outer`."""
    peers, whole, root_path = parts.peers, cast(ASGIApp, outer), args.root_path or ""
    passes_on: Callable[[str], bool] = lambda path: False  # noqa: E731
    if peers is not None:
        whole = peers.forwarding(outer, root_path)
        passes_on = functools.partial(peers.passes_on, root_path=root_path)
    return http_server.uvicorn_config(whole, args, settings, parts.bodies, passes_on, outer.turns)


def _say_ready(mine: FrontEnd) -> None:
    """Tell the supervisor, and what the engines have said, for the next one in this place."""
    hello = [(name.hex(), text.hex()) for name, text in several_clients.heard().items()]
    mine.link.send({"hello": hello})


def _invitation(args: Namespace, address: str, sock: socket.socket) -> str:
    if not args.uds:
        scheme, _, rest = address.partition("://")
        host = rest.rpartition(":")[0]
        reachable = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host  # noqa: S104 - shown
        address = f"{scheme}://{reachable}:{sock.getsockname()[1]}"
    name = model_name(args)
    return (
        f"ready: {name} on {address} - try: curl {address}/v1/chat/completions "
        "-H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )

"""Runs the HTTP server until a signal or the engine's death, and reports its state to systemd."""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import resource
import signal
import socket
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from server.concurrency import Turns, cancel, usable_memory
from server.engine import vllm_http
from server.engine.restarts import Restarts
from server.front_ends import FrontEnd, Link
from server.http.byte_budget import ByteBudget
from server.http.drain import close_port, cut, finish
from server.http.head_check import HeadCheck
from server.http.protocol import Connection, ConnectionLimits, ServerState
from server.http.shared_port import SharedPort
from server.settings import ConnectionSettings, Settings
from server.telemetry.log import bound_access_log, bound_messages
from server.telemetry.service import notify

log = logging.getLogger("saccade")

# Exit statuses.
_ENGINE_DIED = 1
_REQUESTS_CUT = 3
_ENGINE_CHECK_INTERVAL_S = 1.0
# When the engine has died, its requests end with errors at once. Others, such as those that still
# fetch an image, cannot succeed, and are cut off after this time.
_DEAD_ENGINE_DRAIN_S = 2.0
# In every answer. Nothing of this API is meant to be shown in a page of others, or to be cached.
SECURITY_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]
_CONNECTION_CHECK_INTERVAL_S = 1.0
# The other half of the files is for fetches, workers and uploads.
_CONNECTIONS_SHARE_OF_FILES = 1 / 2
# How many more objects than before make the garbage collector look at the young ones. Python's
# default of 700 is reached every few requests, which takes a fiftieth of the event loop's time. A
# request leaves some 40 small objects in cycles, without its images, so that garbage stays below a
# few megabytes.
_YOUNG_OBJECTS = 5_000
# Of the files that a process may open, these are never for connections, however many are allowed.
_RESERVED_FILES = 128
_RESERVED_SHARE_OF_FILES = 1 / 4
# A connection that waits may hold some 0.3 MiB of a request that nobody has read yet, so all of
# them together may hold 1/16 of the memory.
_MEMORY_PER_CONNECTION = 5 << 20


class Server(uvicorn.Server):
    """uvicorn with another end: without its signal handlers, which would end the process at once,
    and in steps that lose no request behind a proxy."""

    on_started: Callable[[], None] = staticmethod(lambda: None)
    on_announced: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, config: uvicorn.Config, mine: FrontEnd | None = None) -> None:
        """`mine`: this process, if others accept connections from the same socket."""
        super().__init__(config)
        self._mine = mine
        self.server_state: ServerState = ServerState()
        self.cut_requests = 0
        """How many requests were cut off at the end."""
        self._drains_until: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._mine is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            ports: list[Any] = [SharedPort(sock, self._mine, self) for sock in sockets or ()]
            self.servers = ports
        _spare_event_loop()
        self._checks = asyncio.create_task(self._check_connections())
        self.on_started()
        notify("READY=1")

    def begin_drain(self, delay_s: float) -> None:
        """Stop in `delay_s`. Until then the port stays open for those who do not know yet that the
        server stops; answers close their connections."""
        self.server_state.drains = True
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.announce_end()
        asyncio.get_running_loop().call_later(delay_s, self._exit)

    def end_now(self) -> None:
        """Stop without waiting for running requests."""
        self.server_state.must_end = True
        self._exit()

    def end_without_engine(self) -> None:
        """Stop because the engine has died."""
        self.server_state.engine_has_died = True
        self._exit()

    def _exit(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, then wait for the running requests, but no longer than the drain time-out
        allows."""
        try:
            self.server_state.drains = True
            await close_port(self.servers, sockets or [], self.server_state)
            limit_s: float = self.config.timeout_graceful_shutdown or 0
            if self.server_state.engine_has_died:
                limit_s = min(limit_s, _DEAD_ENGINE_DRAIN_S)
            until = self._drains_until = asyncio.get_running_loop().time() + limit_s
            if not await finish(self.server_state, until):
                self.cut_requests = await cut(self.server_state)
            if self.cut_requests:
                log.error("stopped before %d requests were answered", self.cut_requests)
            await self.lifespan.shutdown()
        finally:
            self._checks.cancel()

    def left_to_drain_s(self) -> float:
        """How long running requests may still take, in seconds, once the port is closed."""
        if self._drains_until is None:
            return 0.0
        return max(0.0, self._drains_until - asyncio.get_running_loop().time())

    async def _check_connections(self) -> None:
        while True:
            await asyncio.sleep(_CONNECTION_CHECK_INTERVAL_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):  # and not a websocket
                    connection.check(now)


def _spare_event_loop() -> None:
    """Make what Python does beside each request cheaper. vLLM has frozen the objects of the start,
    so that the collector no longer looks at them."""
    gc.set_threshold(_YOUNG_OBJECTS)
    # vLLM reads deprecated fields of each request. Python ignores these warnings too, but only
    # after it has compared each one with a dozen filters of libraries.
    if not sys.warnoptions:
        warnings.simplefilter("ignore", DeprecationWarning)


def uvicorn_config(
    app: ASGIApp,
    args: Namespace,
    settings: Settings,
    bodies: ByteBudget | None = None,
    is_passed_on: Callable[[str], bool] = lambda path: False,
    begun: Turns | None = None,
) -> uvicorn.Config:
    """The settings of uvicorn: vLLM's flags, and ours for logs and shutdown. Requests whose bodies
    would find no room in `bodies` are refused as soon as their heads are read, unless another
    process gets them: their path `is_passed_on`. Requests begin in the turns `begun`."""
    heads = None
    if bodies is not None:
        heads = HeadCheck(bodies, settings.http.max_request_bytes, is_passed_on, begun)
    limits = connection_limits(settings.connections)
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, limits=limits, heads=heads),  # type: ignore[arg-type]
        loop="none",
        log_config=vllm_http.get_uvicorn_log_config(args) or uvicorn.config.LOGGING_CONFIG,
        log_level=args.uvicorn_log_level,
        access_log=not (
            args.disable_uvicorn_access_log or settings.observability.log_format == "json"
        ),
        timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5")),
        timeout_graceful_shutdown=args.shutdown_timeout or settings.http.drain_timeout_s,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers or "TLSv1",
        headers=SECURITY_HEADERS,
        server_header=False,
    )
    bound_access_log()
    return config


def connection_limits(settings: ConnectionSettings) -> ConnectionLimits:
    """The limits, with the default number of connections for this machine."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(int(files * _CONNECTIONS_SHARE_OF_FILES), usable_memory() // _MEMORY_PER_CONNECTION)
    return ConnectionLimits(
        connections=settings.max_connections or max(1, most),
        files=files - min(_RESERVED_FILES, int(files * _RESERVED_SHARE_OF_FILES)),
        url_bytes=settings.max_url_bytes,
        header_bytes=settings.max_header_bytes,
        header_fields=settings.max_header_fields,
        header_timeout_s=settings.header_timeout_s,
        send_timeout_s=settings.send_timeout_s,
    )


async def serve(
    server: Server,
    sock: socket.socket,
    engine: vllm_http.AsyncLLM,
    app: FastAPI,
    delay_s: float,
    supervisor: Link | None = None,
) -> int:
    """Serve until a signal. The first lets running requests finish, the second does not wait. After
    SIGTERM the port stays open for `delay_s`, but not after SIGINT: that comes from a terminal.
    Where there is a `supervisor`, it gets the signals, and says what to do.

    Returns the exit status: 1 if the engine has died, 3 if requests were cut off.
    """

    state = app.state  # which vLLM removes from the app before its end

    def stop(delay_s: float) -> None:
        if state.draining:
            server.end_now()
            return
        state.draining = True
        notify("STOPPING=1")
        log.info("stopping: running requests may finish")
        server.begin_drain(delay_s)

    def obey(link: Link) -> None:
        received = link.receive()
        if received is None:
            loop.remove_reader(link)
            return
        do = received[0]["do"]
        if do == "answer":
            link.send({"alive": True})
        elif do == "announce":
            server.on_announced()
        elif do == "end":
            state.draining = True
            server.end_now()
        elif not state.draining:
            stop(delay_s if do == "drain" else 0.0)

    loop = asyncio.get_running_loop()
    if supervisor is not None:
        loop.add_reader(supervisor, obey, supervisor)
    else:
        # Not handlers of the loop: when they are removed, a further signal would end the process.
        for number, delay in ((signal.SIGINT, 0.0), (signal.SIGTERM, delay_s)):
            later = functools.partial(loop.call_soon_threadsafe, stop, delay)
            signal.signal(number, lambda *_, later=later: later())
    bound_messages()
    watch = asyncio.create_task(_watch(server, engine, state.restarts))
    try:
        await server.serve(sockets=[sock])
    finally:
        await cancel(watch)
        if supervisor is None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
    if engine.errored:
        return _ENGINE_DIED
    return _REQUESTS_CUT if server.cut_requests else 0


async def _watch(server: Server, engine: vllm_http.AsyncLLM, restarts: Restarts | None) -> None:
    """Stop the server when its engine has died, so that its supervisor starts another; with
    `restarts`, only when it cannot be started again."""
    if restarts is None and vllm_http.stays_up_without_engine():
        return
    while True:
        while not engine.errored:  # noqa: ASYNC110 - the engine offers nothing to wait for
            await asyncio.sleep(_ENGINE_CHECK_INTERVAL_S)
        if restarts is None or not await restarts.again():
            break
    log.error("the engine has died; stopping")
    server.end_without_engine()

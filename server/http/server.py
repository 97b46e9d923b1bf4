"""Runs the HTTP server until a signal or the engine's death, and reports its state to systemd."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from server.engine import vllm_http
from server.http.observe import Observed
from server.settings import Settings

log = logging.getLogger("saccade")

_ENGINE_CHECK_INTERVAL_S = 1.0


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process at once."""

    on_started: Callable[[], None] = staticmethod(lambda: None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()
        _notify("READY=1")


def uvicorn_config(app: Observed, args: Namespace, settings: Settings) -> uvicorn.Config:
    """The settings of uvicorn: vLLM's flags, and ours for logs and shutdown."""
    return uvicorn.Config(
        app,
        loop="none",
        log_config=vllm_http.get_uvicorn_log_config(args) or uvicorn.config.LOGGING_CONFIG,
        log_level=args.uvicorn_log_level,
        access_log=not (
            args.disable_uvicorn_access_log or settings.observability.log_format == "json"
        ),
        timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5")),
        timeout_graceful_shutdown=args.shutdown_timeout or settings.http.drain_timeout_s,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers or "TLSv1",
    )


async def serve(
    server: Server, sock: socket.socket, engine: vllm_http.AsyncLLM, app: FastAPI
) -> int:
    """Serve until a signal. The first lets running requests finish, the second does not wait.

    Returns the exit status: 1 if the engine has died.
    """

    def stop() -> None:
        if app.state.draining:
            server.force_exit = True
        app.state.draining = True
        _notify("STOPPING=1")
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    watch = asyncio.create_task(_watch(server, engine))
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
    return 1 if engine.errored else 0


async def _watch(server: Server, engine: vllm_http.AsyncLLM) -> None:
    """Stop the server when its engine has died, so that its supervisor starts another."""
    if vllm_http.stays_up_without_engine():
        return
    while not engine.errored:  # noqa: ASYNC110 - the engine offers nothing to wait for
        await asyncio.sleep(_ENGINE_CHECK_INTERVAL_S)
    log.error("the engine has died; stopping")
    server.should_exit = True


def _notify(state: str) -> None:
    """Tell systemd, if it asked for it (`Type=notify`; sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # A supervisor that no longer listens must not stop the server.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.sendto(state.encode(), address)

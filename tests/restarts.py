"""Servers that start in a moment: the real HTTP server, its probes and its end, without an engine.

They are forks of the template of `tests.starts`. The app answers after a while, whole or as
a stream, so that requests are running when the server stops.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx

from tests.http_server import ARGS
from tests.starts import Started, template

CHAT = "/v1/chat/completions"
_TIMEOUT_S = 120


@dataclass
class Running:
    """A server that was started."""

    process: Started
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begun(self) -> int:
        """How many requests have begun."""
        return int(httpx.get(f"{self.url}/begun").text)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(_TIMEOUT_S)


def start(port: int, *, delay_s: float = 0.0, timeout_s: int = 30) -> Running:
    """Start a server on `port`; returns when it answers. It ends when this process does."""
    words = json.dumps({"port": port, "delay_s": delay_s, "timeout_s": timeout_s})
    with open(os.devnull, "w") as nowhere:
        output = nowhere.fileno()
        process = template().start("tests.restarts:serve", words, output=output, errors=2)
    server = Running(process, port)
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            server.begun()
            return server
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------------- in the process


def serve(words: str) -> None:
    """Serve until a signal; the exit status is the server's."""
    sys.exit(_serve(**json.loads(words)))


def _serve(port: int, delay_s: float, timeout_s: int) -> int:
    import uvloop

    from server.http import server as http_server
    from server.http.observe import Observed
    from server.settings import HttpSettings, Settings

    app = _app()
    settings = Settings(http=HttpSettings(drain_timeout_s=timeout_s))
    observed = Observed(app, server_timing=True, log_requests=False, traced=False, aborted=[CHAT])
    args = Namespace(**{**ARGS, "shutdown_timeout": 0, "disable_uvicorn_access_log": True})
    config = http_server.uvicorn_config(observed, args, settings)
    engine: Any = SimpleNamespace(errored=False)
    with socket.create_server(("127.0.0.1", port)) as sock:
        serve = http_server.serve(http_server.Server(config), sock, engine, app, delay_s)
        return uvloop.run(serve)


def _app() -> Any:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse

    from server.http import errors, routes

    app = FastAPI()
    app.include_router(routes.status)
    app.state.engine_client = SimpleNamespace(errored=False)
    app.state.heartbeat = SimpleNamespace(stalled=False)
    app.state.restarts = None
    app.state.engines = None
    app.state.image_pool = None
    app.state.draining = False
    errors.add_error_handlers(app)

    async def events(seconds: float) -> AsyncIterator[str]:
        for number in range(4):
            await asyncio.sleep(seconds / 4)
            yield f'data: {{"number": {number}}}\n\n'
        yield "data: [DONE]\n\n"

    @app.get("/begun")
    async def begun() -> int:
        """How many requests have begun."""
        return begun_requests

    begun_requests = 0

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        nonlocal begun_requests
        asked = await request.json()
        begun_requests += 1
        if asked["stream"]:
            return StreamingResponse(events(asked["seconds"]), media_type="text/event-stream")
        try:
            await asyncio.sleep(asked["seconds"])
        except asyncio.CancelledError:  # as vLLM's serving class does
            return JSONResponse({"error": {"message": "Client disconnected"}}, status_code=400)
        return Response("{}", media_type="application/json")

    return app

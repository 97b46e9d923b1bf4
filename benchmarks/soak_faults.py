"""Faults that a soak injects, one after the other: of workers, of the engine and of Redis."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.processes import Server
from benchmarks.redis_server import RedisServer

_ENGINE_PAUSE_S = 5.0
_REDIS_PAUSE_S = 8.0


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault, and when it began: seconds since the start of the run."""

    at_s: float
    name: str


def faults(server: Server, redis: RedisServer) -> dict[str, Callable[[], None]]:
    """Functions that inject a fault and return when it is over, or the server's turn to mend it."""

    def send(number: int, title: str, count: int | None = None) -> None:
        for pid in server.titled(title)[:count]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def hold_engine() -> None:
        send(signal.SIGSTOP, "VLLM::")
        time.sleep(_ENGINE_PAUSE_S)
        send(signal.SIGCONT, "VLLM::")

    def hold_redis() -> None:
        redis.freeze()
        time.sleep(_REDIS_PAUSE_S)
        redis.resume()

    def restart_redis() -> None:
        redis.kill()
        time.sleep(_REDIS_PAUSE_S)
        redis.restart()

    return {
        "an image worker is killed": lambda: send(signal.SIGKILL, "ImageWorker", 1),
        "Redis is stopped for 8 s": hold_redis,
        "an image worker is stopped": lambda: send(signal.SIGSTOP, "ImageWorker", 1),
        "all image workers are killed": lambda: send(signal.SIGKILL, "ImageWorker"),
        "Redis is killed and restarted after 8 s": restart_redis,
        "the forkserver is killed": lambda: send(signal.SIGKILL, "forkserver"),
        "the engine is stopped for 5 s": hold_engine,
    }


@contextlib.contextmanager
def injection(
    chosen: dict[str, Callable[[], None]], interval_s: float, began: float
) -> Iterator[list[Injected]]:
    """Inject the faults in turn during the block, one each `interval_s`."""
    injected: list[Injected] = []
    ended = threading.Event()

    def run() -> None:
        while True:
            for name, inject in chosen.items():
                if ended.wait(interval_s):
                    return
                injected.append(Injected(round(time.monotonic() - began, 1), name))
                inject()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield injected
    finally:
        ended.set()
        thread.join()

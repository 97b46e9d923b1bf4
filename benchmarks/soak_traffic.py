"""The load of a soak: clients in threads, and what became of their requests."""

import collections
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak_client import Client, Left
from benchmarks.soak_files import Files
from benchmarks.soak_requests import KINDS
from tests.hostile_origin import HostileOrigin

_END_LIMIT_S = 240.0
_MAX_FAILURES = 100  # that a result shows


@dataclass
class Outcomes:
    """How often each kind of request ended how: with a status and code, or by leaving."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, outcome: str, seconds: float, failure: str = "") -> None:
        with self.lock:
            self.counts[kind, outcome] += 1
            self.slowest_s[kind] = max(self.slowest_s.get(kind, 0.0), seconds)
            if failure and len(self.failures) < _MAX_FAILURES:
                at = time.strftime("%H:%M:%S")
                self.failures.append(f"{at} {kind}: {failure}")

    def as_json(self) -> dict[str, Any]:
        kinds: dict[str, dict[str, int]] = {}
        for (kind, outcome), count in sorted(self.counts.items()):
            kinds.setdefault(kind, {})[outcome] = count
        slowest = {kind: round(seconds, 1) for kind, seconds in sorted(self.slowest_s.items())}
        return {"requests": kinds, "slowest_s": slowest, "failures": self.failures}


class _Load(threading.Thread):
    """Sends requests of one client, drawn by their weights, until it is stopped."""

    def __init__(self, client: Client, outcomes: Outcomes, pause_s: float) -> None:
        super().__init__(daemon=True)
        self._client, self._outcomes, self._pause_s = client, outcomes, pause_s
        self._ended = threading.Event()

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        names, weights = list(KINDS), [kind.weight for kind in KINDS.values()]
        rng = self._client.rng
        while not self._ended.wait(rng.uniform(0, 2 * self._pause_s)):
            self._one(rng.choices(names, weights)[0])
        self._client.close()

    def _one(self, name: str) -> None:
        kind, started = KINDS[name], time.monotonic()
        failure = ""
        try:
            status, body = kind.run(self._client)
            outcome = f"{status} {_code(body)}".strip()
            if status not in (*kind.statuses, 503):
                failure = f"{status}: {body[:300].decode(errors='replace')}"
        except Left as left:
            outcome = str(left)
        except (OSError, http.client.HTTPException) as error:
            outcome = type(error).__name__
            failure = repr(error)
        if failure or outcome.startswith("left"):
            self._client.close()
        self._outcomes.add(name, outcome, time.monotonic() - started, failure)


def _code(body: bytes) -> str:
    """The error's code or type; empty for an answer."""
    if body.startswith(b"{"):
        with contextlib.suppress(ValueError):
            error = json.loads(body).get("error") or {}
            return str(error.get("code") or error.get("type") or "")
    return "error event" if b'data: {"error"' in body else ""


@contextlib.contextmanager
def traffic(
    port: int, concurrency: int, pause_s: float, files: Files, origin: HostileOrigin
) -> Iterator[Outcomes]:
    """Clients that send requests during the block; they finish their last ones at its end."""
    outcomes = Outcomes()
    loads = [
        _Load(Client(port, number, files, origin), outcomes, pause_s)
        for number in range(concurrency)
    ]
    for load in loads:
        load.start()
    try:
        yield outcomes
    finally:
        for load in loads:
            load.stop()
        for load in loads:
            load.join(_END_LIMIT_S)
            if load.is_alive():
                outcomes.add("end", "hangs", 0.0, "a client still waits for its answer")

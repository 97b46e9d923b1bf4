"""What a tier below the host's memory offers, and what is counted of each tier."""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.engine.embedding_cache.breaker import Breaker
from server.engine.embedding_cache.entries import Spec
from server.telemetry.metrics import EMBEDDING_SECONDS


@dataclass
class Counts:
    """What happened in one tier since the start. `seconds`: operation -> counts by bucket, and the
    sum of all. Safe to use from several threads."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    errors: int = 0
    dropped: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, number: int = 1) -> None:
        with self._lock:
            setattr(self, what, getattr(self, what) + number)

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Count the time that the body takes: in a bucket of the histogram, and in its sum."""
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            with self._lock:
                row = self.seconds.setdefault(operation, [0.0] * (len(EMBEDDING_SECONDS) + 2))
                row[bisect_left(EMBEDDING_SECONDS, taken)] += 1
                row[-1] += taken

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            names = ("hits", "misses", "evictions", "errors", "dropped")
            seconds = {operation: list(row) for operation, row in self.seconds.items()}
            return {name: getattr(self, name) for name in names} | {"seconds": seconds}


class Tier(Protocol):
    """A place for entries that is larger or lives longer than the host's memory.

    Its calls come from threads of its own and may block. They raise DamagedEntry, or anything else
    where the tier fails, OSError as a rule.
    """

    name: str
    counts: Counts
    breaker: Breaker

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        """Fill `into` with the entry `key`; False if there is none. A damaged one is deleted."""

    def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
        """Keep an entry: all of it or nothing."""

    def delete(self, key: str) -> None:
        """Delete an entry, if it is there."""

    def clear(self) -> None:
        """Delete all entries of this model."""

    def size(self) -> dict[str, int | None]:
        """`entries` and `bytes` kept, and `max_bytes`; None for what the tier cannot know."""

    def close(self) -> None: ...

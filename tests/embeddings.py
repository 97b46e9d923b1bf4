"""Entries of the embedding cache for tests, and a disk tier that a test can block."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from server.engine.embedding_cache.arena import PAGE_BYTES, Arena
from server.engine.embedding_cache.disk import DiskTier
from server.engine.embedding_cache.index import Entry
from server.engine.embedding_cache.shared import SharedTier
from server.engine.embedding_cache.store import EmbeddingStore
from server.engine.embedding_cache.tier import Spec

WAIT_S = 30
NAMESPACE = "0123456789abcdef0123456789abcdef"
PAGE = Spec("F32", PAGE_BYTES // 1024, 256)  # exactly one page of the arena
ODD = Spec("BF16", 41, 1000)  # two pages, the second partly filled


def content(key: str, spec: Spec = PAGE) -> bytes:
    """The embeddings of `key`, the same each time."""
    return blake3(key.encode()).digest(length=spec.nbytes)


def pieces(data: bytes, length: int = 10_000) -> list[memoryview]:
    """`data` in several pieces, as in an arena."""
    whole = memoryview(bytearray(data))
    return [whole[at : at + length] for at in range(0, len(data), length)]


def joined(views: Sequence[memoryview]) -> bytes:
    return b"".join(views)


def stored(store: EmbeddingStore, key: str, spec: Spec = PAGE) -> bytes | None:
    """The embeddings that the store holds in memory for `key`."""
    entry = store.take(key, spec)
    if entry is None:
        return None
    found = joined(store.arena.views(entry.extents))
    store.used(entry)
    store.release(entry)
    return found


def fill(arena: Arena, entry: Entry) -> None:
    """Fill reserved pages, as a worker does."""
    data, at = content(entry.key, entry.spec), 0
    for view in arena.views(entry.extents):
        view[:] = data[at : at + len(view)]
        at += len(view)


def keep(store: EmbeddingStore, key: str, spec: Spec = PAGE) -> bool:
    """Encode and store an image; False if no pages are available."""
    entry = store.reserve(key, spec)
    if entry is None:
        return False
    fill(store.arena, entry)
    store.commit(entry)
    return True


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.002)


def seek(store: EmbeddingStore, key: str, spec: Spec = PAGE) -> bytes | None:
    """The embeddings that the store finds for `key` in any tier."""
    wait_until(lambda: store.settled(key, spec))
    return stored(store, key, spec)


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[EmbeddingStore, SharedTier]]:
    tier = SharedTier(url, NAMESPACE, 6)
    store = EmbeddingStore(Arena(64 * PAGE_BYTES), [tier])
    try:
        yield store, tier
    finally:
        store.close()
        wait_until(lambda: store.arena.free_bytes == store.arena.nbytes)
        store.arena.close()


def share(store: EmbeddingStore, key: str) -> None:
    """Keep an entry and wait until its write has succeeded or failed."""
    assert keep(store, key)
    wait_until(lambda: not store._writes)


def fail(store: EmbeddingStore, tier: SharedTier) -> None:
    """Look up missing entries until the circuit breaker opens."""
    for number in range(100):
        assert seek(store, f"absent{number}") is None
        if tier.breaker.is_open:
            break
    assert tier.breaker.is_open
    assert tier.counts.errors > 0


def recover(store: EmbeddingStore, tier: SharedTier) -> None:
    number = 0

    def closed() -> bool:
        nonlocal number
        number += 1
        if tier.breaker.may_try:
            assert seek(store, f"other{number}") is None
        return not tier.breaker.is_open

    wait_until(closed)


class GatedDisk(DiskTier):
    """A disk whose reads, writes and clears wait until `gate` is set."""

    def __init__(self, directory: Path, max_bytes: int = 1 << 30) -> None:
        super().__init__(directory, NAMESPACE, max_bytes)
        self.gate = threading.Event()
        self.reached: list[str] = []
        self.passed: list[str] = []

    def _wait(self, what: str) -> None:
        self.reached.append(what)
        assert self.gate.wait(WAIT_S)

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        self._wait("read")
        try:
            return super().read(key, spec, into)
        finally:
            self.passed.append("read")

    def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
        self._wait("write")
        super().write(key, spec, data)
        self.passed.append("write")

    def clear(self) -> None:
        self._wait("clear")
        super().clear()
        self.passed.append("clear")

"""Embeddings in memory that outlives the process which has the cache."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from server.engine.embedding_cache.arena import PAGE_BYTES, Arena, LastingMemory
from server.engine.embedding_cache.store import EmbeddingStore
from server.engine.embedding_cache.tier import Spec
from tests.embeddings import ODD, PAGE, content, keep, stored

PAGES = 16
SPECS = (ODD, PAGE, Spec("F32", 3 * PAGE.rows, PAGE.width))


@pytest.fixture
def memory() -> Iterator[LastingMemory]:
    made = LastingMemory(PAGES * PAGE_BYTES)
    yield made
    made.close()


def opened(memory: LastingMemory) -> EmbeddingStore:
    """The store of another process, as it finds the memory."""
    return EmbeddingStore(Arena(PAGES * PAGE_BYTES, memory.path))


def test_the_next_process_finds_whole_entries_only(memory: LastingMemory) -> None:
    store = opened(memory)
    assert keep(store, "a", ODD)
    assert keep(store, "b", PAGE)
    assert store.reserve("being made", PAGE) is not None
    after = opened(memory)
    assert after.snapshot()["host"]["entries"] == 2
    assert stored(after, "a", ODD) == content("a", ODD)
    assert stored(after, "b", PAGE) == content("b", PAGE)
    assert stored(after, "being made", PAGE) is None
    assert after.arena.free_bytes == store.arena.free_bytes + PAGE_BYTES


def test_found_entries_are_evicted_and_their_room_is_used(memory: LastingMemory) -> None:
    store = opened(memory)
    for number in range(PAGES):
        assert keep(store, f"old {number}", PAGE)
    after = opened(memory)
    assert not after.arena.free_bytes
    for number in range(PAGES):
        assert keep(after, f"new {number}", PAGE)
    last = opened(memory)
    held = [name for name in _names("old", "new") if stored(last, name, PAGE) is not None]
    assert len(held) == PAGES
    assert [stored(last, name, PAGE) for name in held] == [content(name, PAGE) for name in held]
    assert "new 15" in held


def _names(*kinds: str) -> list[str]:
    return [f"{kind} {number}" for kind in kinds for number in range(PAGES)]


def test_cleared_entries_do_not_return(memory: LastingMemory) -> None:
    store = opened(memory)
    keep(store, "a", ODD)
    store.clear()
    keep(store, "b", ODD)
    after = opened(memory)
    assert stored(after, "a", ODD) is None
    assert stored(after, "b", ODD) == content("b", ODD)


def test_entries_of_changed_weights_do_not_return(memory: LastingMemory) -> None:
    """The next engine loads the weights that it was started with."""
    store = opened(memory)
    keep(store, "of the old weights", ODD)
    store.detach()
    keep(store, "of the new weights", ODD)
    assert stored(store, "of the new weights", ODD) is not None
    assert opened(memory).snapshot()["host"]["entries"] == 0


def test_an_engine_that_ends_in_order_leaves_its_entries(memory: LastingMemory) -> None:
    store = opened(memory)
    keep(store, "a", ODD)
    store.close()
    store.arena.close()
    assert stored(opened(memory), "a", ODD) == content("a", ODD)


def test_a_name_that_is_too_long_for_the_directory_is_left_out(memory: LastingMemory) -> None:
    store = opened(memory)
    long, short = "n" * 600, "n" * 300
    for name in (long, short):
        assert keep(store, name, ODD)
        assert stored(store, name, ODD) == content(name, ODD)
    after = opened(memory)
    assert stored(after, long, ODD) is None
    assert stored(after, short, ODD) == content(short, ODD)


def test_a_scattered_entry_is_found(memory: LastingMemory) -> None:
    arena = Arena(PAGES * PAGE_BYTES, memory.path)
    held = [arena.allocate(PAGE_BYTES) for _ in range(PAGES)]
    for extents in held[::2]:
        assert extents is not None
        arena.free(extents)
    store = EmbeddingStore(arena)
    spec = SPECS[-1]
    assert keep(store, "scattered", spec)
    after = opened(memory)
    assert stored(after, "scattered", spec) == content("scattered", spec)
    assert after.arena.free_bytes == (PAGES - 3) * PAGE_BYTES


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_process_leaves_no_damaged_entry(memory: LastingMemory, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3):
        command = [sys.executable, "-m", "tests.unit.test_embedding_directory", memory.path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(rng.randrange(1, 2000))
            os.kill(process.pid, signal.SIGKILL)
        arena = Arena(PAGES * PAGE_BYTES, memory.path)
        assert arena.directory is not None
        records = list(arena.directory.records())
        assert records
        pages = [page for record in records for page in _pages(record.extents)]
        assert len(pages) == len(set(pages))
        for key, spec, extents in records:
            assert b"".join(arena.views(extents)) == content(key, spec)


def _pages(extents: tuple[tuple[int, int], ...]) -> Iterator[int]:
    for offset, length in extents:
        yield from range(offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES + 1)


def _fill(path: str) -> None:
    """Keep entries for ever, which push others out; write a byte for each."""
    store = EmbeddingStore(Arena(PAGES * PAGE_BYTES, path))
    for number in itertools.count():
        keep(store, f"{os.getpid()} {number}", SPECS[number % len(SPECS)])
        os.write(1, b".")


if __name__ == "__main__":
    _fill(sys.argv[1])

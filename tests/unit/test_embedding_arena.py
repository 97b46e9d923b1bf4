"""The arena of the embedding cache: allocation, and access from other processes."""

import gc
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.embedding_cache.arena import (
    PAGE_BYTES,
    Arena,
    ArenaName,
    FreePages,
    attach,
    size_on_pages,
)


def test_an_entry_gets_a_contiguous_run_if_one_is_free() -> None:
    free = FreePages(10)
    assert free.take(4) == [(0, 4)]
    assert free.take(6) == [(4, 6)]
    assert free.take(1) is None
    free.give_back(0, 4)
    free.give_back(5, 2)
    assert free.take(2) == [(5, 2)], "the run that fits best"
    assert free.free == 4


def test_an_entry_gets_scattered_pages_if_no_run_is_long_enough() -> None:
    free = FreePages(6)
    assert [free.take(1) for _ in range(6)] == [[(page, 1)] for page in range(6)]
    for page in (0, 2, 3, 5):
        free.give_back(page, 1)
    taken = free.take(3)
    assert taken is not None
    assert taken[0] == (2, 2), "the longest run first"
    assert sum(count for _, count in taken) == 3
    assert free.free == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=80))
def test_every_page_is_allocated_once_or_free(steps: list[tuple[bool, int]]) -> None:
    free, held, used = FreePages(32), [], set()
    for takes, number in steps:
        if takes:
            runs = free.take(number)
            assert (runs is None) == (number > 32 - len(used))
            if runs is not None:
                pages = [page for first, count in runs for page in range(first, first + count)]
                assert len(pages) == number
                assert used.isdisjoint(pages)
                assert all(0 <= page < 32 for page in pages)
                used.update(pages)
                held.append(runs)
        elif held:
            for first, count in held.pop(number % len(held)):
                free.give_back(first, count)
                used.difference_update(range(first, first + count))
        assert free.free == 32 - len(used)
    for runs in held:
        for first, count in runs:
            free.give_back(first, count)
    assert free.take(32) == [(0, 32)], "adjacent free runs are merged"


@pytest.mark.parametrize(
    ("nbytes", "pages"),
    [(0, 1), (1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2), (5 * PAGE_BYTES - 1, 5)],
)
def test_an_entry_takes_whole_pages(nbytes: int, pages: int) -> None:
    arena = Arena(8 * PAGE_BYTES + 5)
    assert arena.nbytes == 8 * PAGE_BYTES
    extents = arena.allocate(nbytes)
    assert extents is not None
    assert sum(length for _, length in extents) == nbytes
    assert size_on_pages(nbytes) == pages * PAGE_BYTES
    assert arena.free_bytes == (8 - pages) * PAGE_BYTES
    arena.free(extents)
    assert arena.free_bytes == arena.nbytes
    arena.close()


def test_an_entry_that_does_not_fit_is_not_allocated() -> None:
    arena = Arena(2 * PAGE_BYTES)
    assert arena.allocate(2 * PAGE_BYTES + 1) is None
    assert arena.free_bytes == arena.nbytes
    assert arena.allocate(2 * PAGE_BYTES) is not None
    assert arena.allocate(1) is None
    arena.close()
    empty = Arena(0)
    assert empty.allocate(1) is None
    empty.close()


def test_scattered_entries_keep_their_bytes() -> None:
    arena, rng = Arena(64 * PAGE_BYTES), random.Random(1)
    held = []
    for _ in range(300):
        data = rng.randbytes(rng.randrange(1, 5 * PAGE_BYTES))
        extents = arena.allocate(len(data))
        if extents is None:
            for _ in range(10):
                arena.free(held.pop(rng.randrange(len(held)))[0])
            continue
        at = 0
        for view in arena.views(extents):
            view[:] = data[at : at + len(view)]
            at += len(view)
        held.append((extents, data))
    assert any(len(extents) > 1 for extents, _ in held)
    for extents, data in held:
        assert b"".join(arena.views(extents)) == data
    arena.close()


def test_another_process_can_read_and_write_the_arena() -> None:
    arena = Arena(3 * PAGE_BYTES)
    arena.views(((PAGE_BYTES, 5),))[0][:] = b"hello"
    code = (
        "import sys; from server.engine.embedding_cache.arena import ArenaName, attach\n"
        "memory = attach(ArenaName(*map(int, sys.argv[1:])))\n"
        f"assert memory[{PAGE_BYTES}:{PAGE_BYTES + 5}] == b'hello'\n"
        "memory[:5] = b'world'\n"
    )
    name = arena.name
    numbers = [str(number) for number in (name.pid, name.fd, name.nbytes)]
    subprocess.run([sys.executable, "-c", code, *numbers], check=True)
    assert bytes(arena.views(((0, 5),))[0]) == b"world"
    arena.close()


def test_opening_the_arena_of_an_ended_process_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(OSError):
        attach(ArenaName(child.pid, 3, PAGE_BYTES))


def test_closing_the_arena_frees_its_file_and_memory() -> None:
    def arenas() -> int:
        with open("/proc/self/maps") as maps:
            mapped = sum("saccade-embeddings" in line for line in maps)
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                continue  # the descriptor of this listing
        return mapped + sum("saccade-embeddings" in link for link in links)

    gc.collect()
    before = arenas()
    arena = Arena(4 * PAGE_BYTES)
    other = attach(arena.name)
    view = arena.views(((0, PAGE_BYTES),))[0]
    assert arenas() > before
    arena.close()
    view[:4] = b"late"  # existing views stay usable
    assert other[:4] == b"late"
    other.close()
    del view, arena
    gc.collect()
    assert arenas() == before

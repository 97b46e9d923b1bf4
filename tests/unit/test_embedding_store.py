"""The embedding store over its tiers, with real disks whose calls the tests can block."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from server.engine.embedding_cache.arena import PAGE_BYTES, Arena
from server.engine.embedding_cache.disk import DiskTier
from server.engine.embedding_cache.store import READERS, WRITERS, EmbeddingStore, stored_name
from server.engine.embedding_cache.tier import FAILURES_IN_A_ROW, Breaker, Spec, Tier
from tests.embeddings import (
    NAMESPACE,
    ODD,
    PAGE,
    GatedDisk,
    content,
    fill,
    joined,
    keep,
    seek,
    stored,
    wait_until,
)

MakeStore = Callable[..., EmbeddingStore]


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    """Makes stores of some pages over tiers. When they are closed all of their pages must be free:
    nothing may have leaked."""
    stores: list[EmbeddingStore] = []

    def make(pages: int, *tiers: Tier, **options: object) -> EmbeddingStore:
        store = EmbeddingStore(Arena(pages * PAGE_BYTES), tiers, **options)  # type: ignore[arg-type]
        stores.append(store)
        return store

    yield make
    for store in stores:
        for tier in store._opened:
            if isinstance(tier, GatedDisk):
                tier.gate.set()
        store.close()
        wait_until(lambda store=store: store.arena.free_bytes == store.arena.nbytes)
        store.arena.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ------------------------------------------------------------------ the arena alone


def test_a_stored_entry_is_found(make_store: MakeStore) -> None:
    store = make_store(8)
    assert store.settled("a", ODD), "without tiers there is nothing to wait for"
    assert stored(store, "a", ODD) is None
    assert keep(store, "a", ODD)
    assert stored(store, "a", ODD) == content("a", ODD)
    host = store.snapshot()["host"]
    assert (host["entries"], host["bytes"]) == (1, ODD.nbytes)
    assert (host["hits"], host["misses"], host["evictions"]) == (1, 1, 0)


def test_an_entry_of_another_shape_is_a_miss(make_store: MakeStore) -> None:
    store = make_store(8)
    keep(store, "a", PAGE)
    assert store.take("a", ODD) is None
    assert keep(store, "a", ODD), "the new shape replaces it"
    assert store.take("a", PAGE) is None
    assert stored(store, "a", ODD) == content("a", ODD)
    assert store.arena.free_bytes == 6 * PAGE_BYTES


def test_an_entry_being_encoded_is_a_miss(make_store: MakeStore) -> None:
    store = make_store(4)
    room = store.reserve("a", PAGE)
    assert room is not None
    assert store.reserve("a", PAGE) is None, "only one encodes it"
    assert store.take("a", PAGE) is None
    store.abandon(room)
    assert store.arena.free_bytes == store.arena.nbytes
    assert keep(store, "a")


def test_a_full_cache_evicts_the_oldest_entry(make_store: MakeStore) -> None:
    store = make_store(4)
    for key in "abcdef":
        assert keep(store, key)
    assert [stored(store, key) is not None for key in "abcdef"] == [False] * 2 + [True] * 4
    assert store.snapshot()["host"]["evictions"] == 2


def test_an_entry_larger_than_the_arena_evicts_nothing(make_store: MakeStore) -> None:
    store = make_store(2)
    keep(store, "a")
    assert store.reserve("b", Spec("F32", 1000, 1000)) is None
    assert stored(store, "a") == content("a")


def test_an_entry_being_loaded_is_not_evicted(make_store: MakeStore) -> None:
    store = make_store(4)
    for key in "abcd":
        keep(store, key)
    taken = [store.take(key, PAGE) for key in "ab"]
    for number in range(20):
        keep(store, f"more{number}")
    for key, entry in zip("ab", taken, strict=True):
        assert entry is not None
        assert joined(store.arena.views(entry.extents)) == content(key)
    again = store.take("a", PAGE)
    assert again is taken[0]
    rest = [store.take(f"more{number}", PAGE) for number in (18, 19)]
    assert all(rest)
    assert store.reserve("no room", PAGE) is None, "everything is in use"
    for entry in (*taken, again, *rest):
        assert entry is not None
        store.release(entry)
    assert keep(store, "room")


def test_clearing_keeps_an_entry_being_loaded_until_the_load_ends(make_store: MakeStore) -> None:
    store = make_store(2)
    keep(store, "a")
    taken = store.take("a", PAGE)
    assert taken is not None
    store.clear()
    assert store.take("a", PAGE) is None
    keep(store, "b")
    made = [store.reserve("c", PAGE)]  # in the place of b
    assert store.reserve("d", PAGE) is None
    assert joined(store.arena.views(taken.extents)) == content("a")
    store.used(taken)  # of a forgotten entry: only counted
    store.release(taken)
    made.append(store.reserve("d", PAGE))
    store.clear()
    assert store.arena.free_bytes == 0, "an entry being encoded keeps its pages"
    for entry in made:
        assert entry is not None
        store.abandon(entry)


def test_an_entry_begun_before_a_clear_is_absent_after_it(make_store: MakeStore) -> None:
    store = make_store(4)
    old = store.reserve("a", PAGE)
    assert old is not None
    store.clear()
    new = store.reserve("a", PAGE)
    assert new is not None
    assert new.extents != old.extents
    fill(store.arena, old)
    store.commit(old)
    assert store.take("a", PAGE) is None, "the new one is not filled yet"
    fill(store.arena, new)
    store.commit(new)
    assert stored(store, "a") == content("a")
    assert store.arena.free_bytes == 3 * PAGE_BYTES


# ------------------------------------------------------------------ with a disk


def test_an_evicted_entry_is_read_from_the_disk(make_store: MakeStore, tmp_path: Path) -> None:
    first = make_store(8, DiskTier(tmp_path, NAMESPACE, 1 << 30))
    keep(first, "a", ODD)
    first.close()
    store = make_store(8, DiskTier(tmp_path, NAMESPACE, 1 << 30))
    assert seek(store, "a", ODD) == content("a", ODD)
    assert stored(store, "a", ODD) == content("a", ODD)
    found = store.snapshot()
    assert (found["disk"]["hits"], found["disk"]["misses"]) == (1, 0)
    assert (found["host"]["hits"], found["host"]["misses"]) == (1, 1), "the disk had the first"


def test_a_hanging_disk_blocks_no_call(make_store: MakeStore, tmp_path: Path) -> None:
    """No disk call ends before `gate` is set, which is at the end."""
    disk = GatedDisk(tmp_path)
    store = make_store(32, disk)
    for number in range(3 * READERS):
        store.prefetch(f"sought{number}", PAGE)
        assert not store.settled(f"sought{number}", PAGE)
        assert store.take(f"sought{number}", PAGE) is None
    wait_until(lambda: disk.reached.count("read") == READERS)
    for number in range(10):
        keep(store, f"made{number}")
        assert stored(store, f"made{number}") == content(f"made{number}")
    store.clear()
    assert store.settled("sought0", PAGE), "no read begins before the clear ends"
    assert store.snapshot()["host"]["entries"] == 0
    assert not disk.passed
    store.detach()
    store.clear()
    assert set(store.snapshot()) == {"host"}
    disk.gate.set()


def test_a_lookup_that_is_no_longer_needed_frees_its_pages(
    make_store: MakeStore, tmp_path: Path
) -> None:
    disk = GatedDisk(tmp_path)
    store = make_store(2 * READERS + 2, disk)
    keys = [f"image{number}" for number in range(2 * READERS)]
    for key in keys:
        assert not store.settled(key, PAGE)
    wait_until(lambda: disk.reached.count("read") == READERS)
    for key in keys:
        assert keep(store, key) or store.arena.free_bytes == 0
    made = [key for key in keys if stored(store, key) == content(key)]
    assert len(made) >= READERS + 2, "lookups that have not begun free their pages at once"
    disk.gate.set()
    wait_until(lambda: disk.passed.count("write") >= READERS)
    wait_until(lambda: store.arena.free_bytes == (2 * READERS + 2 - len(made)) * PAGE_BYTES)
    assert disk.reached.count("read") == READERS, "lookups that are no longer needed are not read"
    for key in made:
        assert stored(store, key) == content(key)


def test_the_pages_reserved_for_an_absent_entry_are_used_for_its_save(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(4, DiskTier(tmp_path, NAMESPACE, 1 << 30))
    assert seek(store, "a") is None
    assert store.arena.free_bytes == 3 * PAGE_BYTES
    room = store.reserve("a", PAGE)
    assert room is not None
    assert store.arena.free_bytes == 3 * PAGE_BYTES
    assert store.reserve("a", PAGE) is None
    store.abandon(room)
    assert store.arena.free_bytes == 4 * PAGE_BYTES
    assert store.snapshot()["host"]["misses"] == 1, "one miss"
    assert seek(store, "b", PAGE) is None
    assert keep(store, "b", ODD), "saved in another shape than the lookup asked for"
    assert store.arena.free_bytes == 2 * PAGE_BYTES


def test_a_miss_is_remembered_for_some_seconds(make_store: MakeStore, tmp_path: Path) -> None:
    clock = Clock()
    disk, other = GatedDisk(tmp_path), DiskTier(tmp_path, NAMESPACE, 1 << 30)
    disk.gate.set()
    store = make_store(4, disk, clock=clock)
    assert seek(store, "a") is None
    other.write(stored_name("a"), PAGE, [memoryview(content("a"))])
    clock.now += 4
    assert seek(store, "a") is None
    assert disk.reached == ["read"]
    clock.now += 2
    assert seek(store, "a") == content("a")


def test_pages_of_absent_entries_are_reused_without_evictions(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(2, DiskTier(tmp_path, NAMESPACE, 1 << 30))
    for number in range(20):
        assert seek(store, f"absent{number}") is None
    assert keep(store, "a")
    assert store.snapshot()["host"]["evictions"] == 0, "no cached entry was evicted"


def test_a_hit_in_a_lower_tier_fills_the_tiers_above(make_store: MakeStore, tmp_path: Path) -> None:
    upper = DiskTier(tmp_path / "upper", NAMESPACE, 1 << 30)
    lower = DiskTier(tmp_path / "lower", NAMESPACE, 1 << 30)
    lower.name = "lower"
    lower.write(stored_name("a"), PAGE, [memoryview(content("a"))])
    store = make_store(4, upper, lower)
    assert seek(store, "a") == content("a")
    wait_until(lambda: upper.size()["entries"] == 1)
    found = store.snapshot()
    assert [found[tier]["hits"] for tier in ("host", "disk", "lower")] == [0, 0, 1]
    assert [found[tier]["misses"] for tier in ("host", "disk", "lower")] == [1, 1, 0]


def test_a_failing_tier_is_skipped(make_store: MakeStore, tmp_path: Path) -> None:
    class Broken(DiskTier):
        asked = 0

        def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
            self.asked += 1
            raise OSError("no")

        def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
            self.asked += 1
            raise OSError("no")

    clock, broken = Clock(), Broken(tmp_path / "broken", NAMESPACE, 1 << 30)
    broken.breaker = Breaker(clock)
    sound = DiskTier(tmp_path / "sound", NAMESPACE, 1 << 30)
    sound.name = "sound"
    for number in range(10):
        data = memoryview(content(str(number)))
        sound.write(stored_name(str(number)), PAGE, [data])
    store = make_store(16, broken, sound)
    for number in range(10):
        assert seek(store, str(number)) == content(str(number)), "the next tier has it"
    wait_until(lambda: not store._writes)
    asked = broken.asked
    assert FAILURES_IN_A_ROW <= asked <= FAILURES_IN_A_ROW + WRITERS
    assert store.snapshot()["disk"]["errors"] == asked
    clock.now += 1
    seek(store, "a")
    assert broken.asked == asked + 1


def test_writes_beyond_the_queue_limit_are_dropped(make_store: MakeStore, tmp_path: Path) -> None:
    disk = GatedDisk(tmp_path)
    store = make_store(8, disk)
    for number in range(20):
        assert keep(store, str(number)), "the other half of the arena stays available"
    assert store.snapshot()["disk"]["dropped"] == 16
    disk.gate.set()
    wait_until(lambda: disk.size()["entries"] == 4)
    keep(store, "a")
    wait_until(lambda: disk.size()["entries"] == 5)


def test_closing_completes_queued_writes(make_store: MakeStore, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, NAMESPACE, 1 << 30)
    store = make_store(64, disk)
    for number in range(30):
        keep(store, str(number))
    store.close()
    assert disk.size()["entries"] == 30
    assert store.settled("new", PAGE)
    assert store.snapshot()["host"]["entries"] == 0


def test_closing_ends_the_threads(tmp_path: Path) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if "embedding-" in thread.name}

    before = threads()
    store = EmbeddingStore(Arena(8 * PAGE_BYTES), [DiskTier(tmp_path, NAMESPACE, 1 << 30)])
    keep(store, "a")
    seek(store, "b")
    assert threads() - before
    store.close()
    store.arena.close()
    wait_until(lambda: not threads() - before)


# ------------------------------------------------------------------ clearing concurrently


def test_clearing_discards_a_read_in_flight(make_store: MakeStore, tmp_path: Path) -> None:
    disk = GatedDisk(tmp_path)
    other = DiskTier(tmp_path, NAMESPACE, 1 << 30)
    other.write(stored_name("a"), PAGE, [memoryview(content("a"))])
    store = make_store(4, disk)
    assert not store.settled("a", PAGE)
    wait_until(lambda: disk.reached == ["read"])
    store.clear()
    assert store.settled("a", PAGE)
    disk.gate.set()
    wait_until(lambda: {"read", "clear"} <= set(disk.passed))
    wait_until(lambda: not store._clears)
    assert seek(store, "a") is None, "neither in the arena nor on the disk"


def test_clearing_discards_a_write_in_flight(make_store: MakeStore, tmp_path: Path) -> None:
    """The write ends after the clear and leaves nothing; a queued write never begins."""

    class LateWrites(GatedDisk):
        def clear(self) -> None:
            DiskTier.clear(self)
            self.passed.append("clear")
            self.gate.set()  # now the write that had begun goes on

    disk = LateWrites(tmp_path)
    store = make_store(16, disk)
    keep(store, "a")
    wait_until(lambda: disk.reached == ["write"])
    store.clear()
    wait_until(lambda: {"write", "clear"} <= set(disk.passed))
    wait_until(lambda: not (store._writes or store._clears))
    assert disk.passed.index("clear") < disk.passed.index("write")
    assert seek(store, "a") is None
    keep(store, "a")
    wait_until(lambda: disk.size()["entries"] == 1)


def test_clearing_drops_queued_writes(make_store: MakeStore, tmp_path: Path) -> None:
    disk = GatedDisk(tmp_path)
    store = make_store(32, disk)
    for number in range(10):
        keep(store, str(number))
    wait_until(lambda: len(disk.reached) == 2)
    store.clear()
    disk.gate.set()
    wait_until(lambda: not (store._writes or store._clears))
    assert disk.reached.count("write") == 2
    disk.clear()
    assert disk.size()["entries"] == 0


# ------------------------------------------------------------------ random operations


class FlakyDisk(DiskTier):
    """A disk that is slow and fails now and then."""

    rng: random.Random

    def _stumble(self) -> None:
        time.sleep(self.rng.random() * 0.003)
        if self.rng.random() < 0.05:
            raise OSError("stumbled")

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        self._stumble()
        found = super().read(key, spec, into)
        self._stumble()
        return found

    def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
        self._stumble()
        super().write(key, spec, data)
        self._stumble()


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_leak_no_page_and_return_no_wrong_bytes(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    tiers = [FlakyDisk(tmp_path / name, NAMESPACE, 12 * PAGE_BYTES) for name in ("one", "two")]
    for tier in tiers:
        tier.rng = random.Random(seed)
        tier.breaker = Breaker(lambda: time.monotonic() * 1000)  # pauses of milliseconds
    store = EmbeddingStore(Arena(10 * PAGE_BYTES), tiers)
    taken, made = [], []
    checked = 0
    for _ in range(3000):
        key = f"image{int(rng.paretovariate(0.7)) % 30}"
        spec = ODD if rng.random() < 0.05 else (PAGE, ODD)[len(key) % 2]
        match rng.choices(
            ("prefetch", "settled", "take", "release", "reserve", "end", "clear", "pause"),
            (2, 8, 8, 8, 8, 8, 0.1, 1),
        )[0]:
            case "prefetch":
                store.prefetch(key, spec)
            case "settled":
                store.settled(key, spec)
            case "take":
                if (entry := store.take(key, spec)) is not None:
                    taken.append(entry)
            case "release" if taken:
                entry = taken.pop(rng.randrange(len(taken)))
                data = joined(store.arena.views(entry.extents))
                assert data == content(entry.key, entry.spec)
                checked += 1
                store.used(entry)
                store.release(entry)
            case "reserve":
                if (entry := store.reserve(key, spec)) is not None:
                    made.append(entry)
            case "end" if made:
                entry = made.pop(rng.randrange(len(made)))
                if rng.random() < 0.8:
                    fill(store.arena, entry)
                    store.commit(entry)
                else:
                    store.abandon(entry)
            case "clear":
                store.clear()
            case "pause":
                time.sleep(0.003)
    assert checked > 50
    for entry in taken:
        assert joined(store.arena.views(entry.extents)) == content(entry.key, entry.spec)
        store.release(entry)
    for entry in made:
        store.abandon(entry)
    store.close()
    wait_until(lambda: store.arena.free_bytes == store.arena.nbytes)
    store.arena.close()


# ------------------------------------------------------------------ the breaker


def test_a_breaker_opens_after_failures_and_allows_one_trial() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert breaker.is_open
    assert not breaker.may_try
    clock.now += 1
    assert breaker.may_try
    assert [breaker.allows(), breaker.allows()] == [True, False], "one trial"
    breaker.failed()
    clock.now += 1.5
    assert not breaker.allows(), "the pause has doubled"
    clock.now += 0.5
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.allows()


def test_failures_of_calls_begun_before_the_pause_do_not_extend_it() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES_IN_A_ROW + 10):
        breaker.failed()
    clock.now += 1
    assert breaker.allows()


def test_the_pause_of_a_breaker_is_bounded() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(100):
        breaker.failed()
        clock.now += 30
        assert breaker.allows()

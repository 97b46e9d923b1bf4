"""The disk and shared tiers of the embedding cache, and how they fail."""

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.engine.embedding_cache import disk as disk_module
from server.engine.embedding_cache.arena import PAGE_BYTES, Arena
from server.engine.embedding_cache.disk import DiskTier
from server.engine.embedding_cache.shared import SharedTier
from server.engine.embedding_cache.store import EmbeddingStore, stored_name
from server.engine.embedding_cache.tier import DamagedEntry, Spec, Tier, checksum, head
from tests.embeddings import (
    NAMESPACE,
    ODD,
    PAGE,
    content,
    fail,
    joined,
    keep,
    opened,
    pieces,
    recover,
    seek,
    share,
    stored,
    wait_until,
)
from tests.redis_server import RedisServer, redis_server
from tests.small_disks import filled, small_disk

OTHER = "f" * 32
FILE_BYTES = len(head("0" * 64, PAGE, "0" * 64)) + PAGE.nbytes


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def open_disk(directory: Path, files: int = 1000, namespace: str = NAMESPACE) -> DiskTier:
    return DiskTier(directory, namespace, files * FILE_BYTES)


def write(tier: Tier, key: str, spec: Spec = PAGE) -> None:
    tier.write(stored_name(key), spec, pieces(content(key, spec)))


def read(tier: Tier, key: str, spec: Spec = PAGE) -> bytes | None:
    into = pieces(bytes(spec.nbytes), 7_001)
    return joined(into) if tier.read(stored_name(key), spec, into) else None


def entry_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*.safetensors") if path.is_file()]


def on_disk(directory: Path) -> int:
    """Bytes of all entries, complete and partial."""
    found = [*directory.rglob("*.safetensors"), *directory.rglob("*.part")]
    return sum(path.stat().st_size for path in found)


# ------------------------------------------------------------------ damage, in both tiers


def document(key: str, spec: Spec, data: bytes) -> bytes:
    return head(stored_name(key), spec, checksum([memoryview(data)])) + data


GOOD = document("a", PAGE, content("a"))
DAMAGED = {
    "one byte": GOOD[:-100] + bytes([GOOD[-100] ^ 1]) + GOOD[-99:],
    "cut short": GOOD[:-1],
    "cut in the header": GOOD[:60],
    "cut in the length": GOOD[:5],
    "no data": GOOD[: -PAGE.nbytes],
    "too long": GOOD + b"x",
    "zeros": bytes(len(GOOD)),
    "random": b"\xff" * len(GOOD),
    "a header without end": struct.pack("<Q", 1 << 62) + GOOD[8:],
    "no JSON": struct.pack("<Q", 8) + b"{{{{{{{{" + content("a"),
    "other JSON": struct.pack("<Q", 8) + b"[1,2, 3]" + content("a"),
    "deep JSON": struct.pack("<Q", 4096) + b"[" * 4096 + content("a"),
    "long numbers": struct.pack("<Q", 4096) + b"9" * 4096 + content("a"),
    "another key": document("b", PAGE, content("b")),
    "another shape": document("a", ODD, content("a", ODD)),
    "another type": document("a", Spec("F16", PAGE.rows * 2, PAGE.width), content("a")),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_reported_and_deleted(damage: str, tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    write(tier, "a")
    (path,) = entry_files(tmp_path)
    assert path.read_bytes() == GOOD, "each variant must differ only by its damage"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(DamagedEntry):
        read(tier, "a")
    assert not entry_files(tmp_path)
    assert read(tier, "a") is None
    write(tier, "a")
    assert read(tier, "a") == content("a")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_redis_value_is_reported_and_deleted(damage: str, redis: RedisServer) -> None:
    with contextlib.closing(SharedTier(redis.url, NAMESPACE, 2)) as tier:
        write(tier, "a")
        with contextlib.closing(redis.client()) as client:
            name = f"saccade:embedding:{NAMESPACE}:{stored_name('a')}"
            assert client.get(name) == GOOD
            client.set(name, DAMAGED[damage])
            with pytest.raises(DamagedEntry):
                read(tier, "a")
            assert not client.exists(name)
        assert read(tier, "a") is None


def test_a_redis_value_of_another_type_is_reported_and_deleted(redis: RedisServer) -> None:
    with (
        contextlib.closing(SharedTier(redis.url, NAMESPACE, 2)) as tier,
        contextlib.closing(redis.client()) as client,
    ):
        name = f"saccade:embedding:{NAMESPACE}:{stored_name('a')}"
        client.delete(name)
        client.rpush(name, "what", "is", "this")
        with pytest.raises(DamagedEntry):
            read(tier, "a")
        assert not client.exists(name)


def test_damaged_entries_are_misses_and_errors(redis: RedisServer, tmp_path: Path) -> None:
    tiers = [open_disk(tmp_path), SharedTier(redis.url, OTHER, 6)]
    for tier in tiers:
        write(tier, "a")
    (path,) = entry_files(tmp_path)
    path.write_bytes(DAMAGED["one byte"])
    with contextlib.closing(redis.client()) as client:
        name = f"saccade:embedding:{OTHER}:{stored_name('a')}"
        client.set(name, DAMAGED["one byte"])
    store = EmbeddingStore(Arena(8 * PAGE_BYTES), tiers)
    assert seek(store, "a") is None
    found = store.snapshot()
    assert [found[tier]["errors"] for tier in ("disk", "shared")] == [1, 1]
    assert [found[tier]["hits"] for tier in ("disk", "shared")] == [0, 0]
    assert not any(tier.breaker.is_open for tier in tiers)
    keep(store, "a")
    store.close()
    assert [read(open_disk(tmp_path), "a"), path.read_bytes()] == [content("a"), GOOD]


# ------------------------------------------------------------------ the disk


@pytest.mark.parametrize("spec", [PAGE, ODD, Spec("F64", 1, 1), Spec("F16", 1000, 1000)])
def test_an_entry_is_read_back_in_its_own_namespace_only(spec: Spec, tmp_path: Path) -> None:
    write(open_disk(tmp_path), "a", spec)
    assert read(open_disk(tmp_path), "a", spec) == content("a", spec)
    assert read(open_disk(tmp_path, namespace=OTHER), "a", spec) is None


def test_safetensors_can_read_an_entry(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    write(open_disk(tmp_path), "a", ODD)
    (path,) = entry_files(tmp_path)
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor("embedding")
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (ODD.rows, ODD.width))
    assert tensor.view(torch.uint8).numpy().tobytes() == content("a", ODD)


def test_the_disk_evicts_the_least_recently_used_entries_at_its_limit(tmp_path: Path) -> None:
    tier = open_disk(tmp_path, files=10)
    write(tier, "used")
    for number in range(40):
        assert read(tier, "used") == content("used")
        write(tier, str(number))
        assert on_disk(tmp_path) <= 10 * FILE_BYTES
    assert tier.size() == {
        "entries": 10,
        "bytes": 10 * FILE_BYTES,
        "max_bytes": 10 * FILE_BYTES,
    }  # fmt: skip
    assert tier.counts.evictions == 31


def test_an_entry_larger_than_the_limit_is_dropped(tmp_path: Path) -> None:
    tier = open_disk(tmp_path, files=1)
    write(tier, "small")
    write(tier, "large", Spec("F32", 1000, 1000))
    assert tier.counts.dropped == 1
    assert read(tier, "small") == content("small")


def test_a_lowered_limit_evicts_the_oldest_entries_on_opening(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    for number in range(10):
        write(tier, str(number))
        path = tmp_path / NAMESPACE / stored_name(str(number))[:2]
        for file in entry_files(path):
            os.utime(file, (number, number))
    again = open_disk(tmp_path, files=4)
    assert on_disk(tmp_path) == 4 * FILE_BYTES
    assert [number for number in range(10) if read(again, str(number))] == [6, 7, 8, 9]


def test_entries_of_another_model_are_evicted_too(tmp_path: Path) -> None:
    other = open_disk(tmp_path, 8, OTHER)
    for number in range(8):
        write(other, str(number))
    tier = open_disk(tmp_path, 8)
    for number in range(8):
        write(tier, str(number))
    assert on_disk(tmp_path) == 8 * FILE_BYTES
    assert all(read(tier, str(number)) for number in range(8))


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    """The directory may also hold models."""
    foreign = [
        tmp_path / "model.safetensors",
        tmp_path / "model" / "model-00001-of-00002.safetensors",
        tmp_path / NAMESPACE / "ab" / "model.safetensors",
        tmp_path / NAMESPACE / "ab" / "download.part",
        tmp_path / "blobs" / f"{'0' * 64}.safetensors",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5 * FILE_BYTES))
        os.utime(path, (1, 1))
    tier = open_disk(tmp_path, files=3)
    for number in range(6):
        write(tier, str(number))
    tier.clear()
    assert all(path.stat().st_size == 5 * FILE_BYTES for path in foreign)
    assert tier.size()["entries"] == 0


def test_two_servers_on_one_directory_share_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs in its own threads and does not know what the other has just written."""
    monkeypatch.setattr(disk_module, "_LONGEST_WAIT_S", 120)
    tiers = [open_disk(tmp_path, 20), open_disk(tmp_path, 20, OTHER)]
    failed: list[BaseException] = []

    def watch() -> None:
        try:
            for _ in range(200):
                with tiers[0]._usage.locked():  # no file is created or renamed meanwhile
                    assert on_disk(tmp_path) <= 20 * FILE_BYTES
                time.sleep(0.002)  # let the others run
        except BaseException as error:
            failed.append(error)

    def work(tier: DiskTier, name: str) -> None:
        try:
            for number in range(60):
                write(tier, f"{name}{number}")
                found = read(tier, f"{name}{number}")
                assert found in (None, content(f"{name}{number}"))
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=work, args=(tier, f"{thread}-{number}-"))
        for number, tier in enumerate(tiers)
        for thread in range(2)
    ]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert on_disk(tmp_path) == 20 * FILE_BYTES


WRITER = """
import sys
from pathlib import Path
from server.engine.embedding_cache import disk
from tests.server.test_embedding_tiers import open_disk, write
disk._LONGEST_WAIT_S = 120
tier = open_disk(Path(sys.argv[1]), 20, sys.argv[2])
print("ready", flush=True)
for number in range(1_000_000):
    write(tier, f"{sys.argv[2]}-{number}")
    if number == 40:
        print("full", flush=True)
"""


def test_killed_servers_lose_only_the_entries_being_written(tmp_path: Path) -> None:
    for killed in (2, 4, 6):
        children = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), namespace],
                stdout=subprocess.PIPE,
                text=True,
            )
            for namespace in (NAMESPACE, OTHER)
        ]
        try:
            for child in children:
                assert child.stdout is not None
                assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "full\n"]
        finally:
            for child in children:
                child.kill()
                child.wait()
                assert child.stdout is not None
                child.stdout.close()
        assert on_disk(tmp_path) <= 20 * FILE_BYTES
        whole, unfinished = entry_files(tmp_path), list(tmp_path.glob("*/*/*.part"))
        assert len(unfinished) <= killed, "each was writing at most one"
        assert len(whole) + len(unfinished) >= 18, "each may have evicted one and written none"
        for path in whole:
            assert path.stat().st_size == FILE_BYTES
            data = path.read_bytes()[-PAGE.nbytes :]
            digest = checksum([memoryview(data)])
            assert path.read_bytes() == head(path.stem, PAGE, digest) + data
    tier = open_disk(tmp_path, 20)
    for number in range(40):
        write(tier, str(number))
        assert on_disk(tmp_path) <= 20 * FILE_BYTES


@pytest.mark.parametrize("modified", [1, 1 << 33], ids=["long ago", "in the future"])
def test_a_partial_file_is_removed_unless_its_writer_goes_on(tmp_path: Path, modified: int) -> None:
    """Whatever the clocks say of its age."""
    folder = tmp_path / NAMESPACE / "ab"
    folder.mkdir(parents=True)
    left, written = (folder / f"{'ab' * 32}.{digit * 16}.part" for digit in "01")
    for path in (left, written):
        path.write_bytes(bytes(FILE_BYTES))
        os.utime(path, (modified, modified))
    with written.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        tier = open_disk(tmp_path, files=3)
        assert (left.exists(), written.exists()) == (False, True)
        for number in range(5):
            write(tier, str(number))
        assert on_disk(tmp_path) == 3 * FILE_BYTES, "a file that is being written counts, too"
        assert written.exists()


def test_a_file_that_is_being_written_survives_the_scan_of_another_server(tmp_path: Path) -> None:
    class Scanned(list[memoryview]):
        """Another server starts when the checksum is computed, and again during the write."""

        starts = 0

        def __iter__(self) -> Iterator[memoryview]:
            self.starts += 1
            open_disk(tmp_path)
            return super().__iter__()

    tier, data = open_disk(tmp_path), Scanned(pieces(content("a")))
    tier.write(stored_name("a"), PAGE, data)
    assert data.starts >= 2
    assert read(tier, "a") == content("a")


def test_a_server_reads_entries_that_another_wrote(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    write(one, "a")
    assert read(two, "a") == content("a")
    assert two.size()["bytes"] == FILE_BYTES, "the size of the file"
    write(two, "b")
    two.clear()
    assert [read(one, "a"), read(one, "b")] == [None, None]


def test_a_server_evicts_entries_that_another_wrote(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path, 5), open_disk(tmp_path, 5)
    for number in range(5):
        write(one, str(number))
    for number in range(5, 10):
        write(two, str(number))
        assert read(two, str(number)) == content(str(number))
    assert on_disk(tmp_path) == 5 * FILE_BYTES


def test_clearing_the_disk_keeps_entries_of_other_models(tmp_path: Path) -> None:
    tier, other = open_disk(tmp_path), open_disk(tmp_path, namespace=OTHER)
    write(tier, "a")
    write(other, "a")
    tier.clear()
    assert read(tier, "a") is None
    assert read(other, "a") == content("a")
    assert tier.size()["entries"] == 1


def test_concurrent_reads_and_evictions_do_not_fail(tmp_path: Path) -> None:
    tier, failed = open_disk(tmp_path, files=3), []

    def work(name: str) -> None:
        try:
            for number in range(150):
                key = f"{number % 6}"
                assert read(tier, key) in (None, content(key))
                write(tier, key)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert on_disk(tmp_path) <= 3 * FILE_BYTES
    assert not list(tmp_path.rglob("*.part"))


def test_reads_and_writes_leave_no_file_open(tmp_path: Path) -> None:
    tier = open_disk(tmp_path, files=3)

    def cycle() -> None:
        for number in range(6):
            write(tier, str(number))
            read(tier, str(number))
        for path in entry_files(tmp_path):
            path.write_bytes(b"damaged")
        for number in range(6):
            with contextlib.suppress(DamagedEntry):
                read(tier, str(number))

    cycle()
    before = len(os.listdir("/proc/self/fd"))
    cycle()
    assert len(os.listdir("/proc/self/fd")) == before


def delete_directory(directory: Path) -> Callable[[], None]:
    shutil.rmtree(directory)
    return lambda: None


def put_a_file_in_its_place(directory: Path) -> Callable[[], None]:
    shutil.rmtree(directory)
    directory.write_text("")
    return directory.unlink


def forbid_large_files(directory: Path) -> Callable[[], None]:
    """Like a full disk: a write fails in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def put_a_directory_in_the_way(directory: Path) -> Callable[[], None]:
    (directory / "saccade-usage").unlink()
    (directory / "saccade-usage").mkdir()
    return (directory / "saccade-usage").rmdir


@pytest.mark.parametrize(
    ("harm", "errors"),
    [
        (delete_directory, False),
        (put_a_file_in_its_place, True),
        (forbid_large_files, True),
        (put_a_directory_in_the_way, True),
    ],
)
def test_a_failing_disk_causes_misses_and_recovers(
    harm: Callable[[Path], Callable[[], None]], errors: bool, tmp_path: Path
) -> None:
    directory = tmp_path / "cache"
    tier = open_disk(directory)
    store = EmbeddingStore(Arena(32 * PAGE_BYTES), [tier])
    restore = harm(directory)
    try:
        for number in range(10):
            assert seek(store, f"absent{number}") is None
            assert keep(store, str(number))
            assert stored(store, str(number)) == content(str(number))
            wait_until(lambda: not store._writes)
        assert (store.snapshot()["disk"]["errors"] > 0) == errors
        store.clear()
    finally:
        restore()
    wait_until(lambda: not store._clears)  # the clear was retried
    wait_until(lambda: tier.breaker.may_try)
    assert keep(store, "after")
    store.close()
    assert read(tier, "after") == content("after")
    assert not list(tmp_path.rglob("*.part"))
    assert store.arena.free_bytes == store.arena.nbytes


@pytest.mark.parametrize("at_the_start", [False, True])
def test_a_full_disk_causes_misses_and_is_used_again_when_it_has_room(
    at_the_start: bool, tmp_path: Path
) -> None:
    with small_disk(tmp_path) as disk:
        directory = disk / "cache"
        if not at_the_start:
            tier = open_disk(directory)
            write(tier, "before")
        with filled(disk):
            if at_the_start:
                tier = open_disk(directory)
            else:
                assert read(tier, "before") == content("before")
            store = EmbeddingStore(Arena(32 * PAGE_BYTES), [tier])
            for number in range(5):
                assert seek(store, f"absent{number}") is None
                assert keep(store, str(number))
                assert stored(store, str(number)) == content(str(number))
                wait_until(lambda: not store._writes)
            assert store.snapshot()["disk"]["errors"]
        wait_until(lambda: tier.breaker.may_try)
        assert keep(store, "after")
        store.close()
        assert read(tier, "after") == content("after")
        assert not list(directory.rglob("*.part"))
        assert tier.size()["bytes"] == on_disk(directory)


def test_a_usage_lock_held_by_a_hung_server_fails_writes_but_not_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_LONGEST_WAIT_S", 0.05)
    tier, other = open_disk(tmp_path), open_disk(tmp_path)
    write(tier, "a")
    with other._usage.locked():
        with pytest.raises(TimeoutError):
            write(tier, "b")
        assert read(tier, "a") == content("a"), "reads need no lock"
    write(tier, "b")
    assert read(tier, "b") == content("b")


def test_a_wrong_usage_count_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_disk(tmp_path, files=10)
    for number in range(5):
        write(tier, str(number))
    (tmp_path / "saccade-usage").write_bytes(struct.pack("<Q", 0))
    monkeypatch.setattr(tier, "_scan_at", 0.0)
    for number in range(5, 30):
        write(tier, str(number))
        assert on_disk(tmp_path) <= 10 * FILE_BYTES
    (tmp_path / "saccade-usage").unlink()
    write(tier, "a")
    assert on_disk(tmp_path) == 10 * FILE_BYTES


def test_a_directory_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        open_disk(tmp_path / "file")


# ------------------------------------------------------------------ Redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def test_replicas_share_entries(redis: RedisServer) -> None:
    with opened(redis.url) as (one, _), opened(redis.url) as (two, tier):
        share(one, "shared")
        assert seek(two, "shared") == content("shared")
        assert (tier.counts.hits, tier.counts.errors) == (1, 0)
        one.clear()
        wait_until(lambda: not one._clears)
        assert stored(two, "shared") == content("shared"), "still in its memory tier"
    with opened(redis.url) as (three, _):
        assert seek(three, "shared") is None


def test_clearing_redis_keeps_entries_of_other_models(redis: RedisServer) -> None:
    with (
        contextlib.closing(SharedTier(redis.url, NAMESPACE, 2)) as tier,
        contextlib.closing(SharedTier(redis.url, OTHER, 2)) as other,
        contextlib.closing(redis.client()) as client,
    ):
        client.set("saccade:other", "1")
        write(other, "a")
        for number in range(2500):
            tier.write(stored_name(str(number)), Spec("F16", 1, 1), [memoryview(b"ab")])
        tier.clear()
        assert read(other, "a") == content("a")
        assert {name.decode() for name in client.keys("saccade:*")} == {
            "saccade:other",
            f"saccade:embedding:{OTHER}:{stored_name('a')}",
        }


def test_a_restarted_redis_is_used_again(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as (store, tier):
        share(store, "a")
        own_redis.stop()
        fail(store, tier)
        share(store, "while it is gone")
        own_redis.start()
        recover(store, tier)
        share(store, "b")
        with contextlib.closing(own_redis.client()) as client:
            assert client.exists(tier._prefix + stored_name("b"))


def test_a_hung_redis_is_used_again_once_it_answers(own_redis: RedisServer) -> None:
    with opened(own_redis.url) as (store, tier):
        share(store, "a")
        own_redis.pause()
        try:
            fail(store, tier)
            assert keep(store, "b")
            assert stored(store, "b") == content("b")
        finally:
            own_redis.resume()
        recover(store, tier)
        share(store, "c")
        assert read(tier, "a") == content("a"), "a late reply must not answer another request"
        assert read(tier, "c") == content("c")


def test_a_full_redis_causes_errors_and_recovers() -> None:
    with (
        redis_server("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server,
        opened(server.url) as (store, tier),
        contextlib.closing(server.client()) as client,
    ):
        number = 0
        while not tier.breaker.is_open:
            share(store, str(number))
            number += 1
            assert number < 1000
        assert tier.counts.errors > 0
        assert stored(store, str(number - 1)) == content(str(number - 1))
        client.flushall()
        recover(store, tier)
        share(store, "after")
        assert read(tier, "after") == content("after")


def test_a_wrong_redis_password_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server(password="right") as server:
        wrong = server.url.replace("right", "hunter2-wrong")
        with opened(wrong) as (store, tier):
            fail(store, tier)
        assert "hunter2" not in caplog.text
        assert "AuthenticationError" in caplog.text
        with opened(server.url) as (store, tier):
            share(store, "a")
            assert read(tier, "a") == content("a")


def test_an_unreachable_redis_does_not_disable_the_memory_tier() -> None:
    with redis_server() as server:
        pass
    with opened(server.url) as (store, tier):
        fail(store, tier)
        share(store, "a")
        assert stored(store, "a") == content("a")
        store.clear()


def test_an_invalid_redis_url_is_an_error() -> None:
    with pytest.raises(ValueError):
        SharedTier("here", NAMESPACE, 2)

"""The store of uploaded files: contents, groups, lifetimes, and recovery after a crash."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.errors import (
    CannotStart,
    FileQuotaExceeded,
    FileStorageFailed,
    ImageTooLarge,
    ServerBusy,
    UnknownFile,
)
from server.imaging.encoded import digest
from server.ingest.files import FileStore, Quota, StoredFile
from server.ingest.files import store as store_module
from tests.scarce_files import no_free_files


class Clock:
    """Clocks that stand still until the test advances them. The wall clock jumps with `ahead_s`,
    by which it is wrong."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.ahead_s = 0.0

    def time(self) -> float:
        return self.now + self.ahead_s

    def monotonic(self) -> float:
        return self.now - 1_000_000_000


@contextlib.asynccontextmanager
async def opened(
    root: Path,
    server: Quota = Quota(),  # noqa: B008
    group: Quota = Quota(),  # noqa: B008
    **more: Any,
) -> AsyncIterator[FileStore]:
    async with FileStore(root, server, group, more.pop("ttl_s", None), **more) as store:
        yield store


async def put(
    store: FileStore, data: bytes, group: str = "", name: str = "a.png", seconds: int | None = None
) -> StoredFile:
    return await store.put(group, data, name, "vision", seconds)


def test_names_survive_a_power_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synchronized = os.fsync, list[str]()

    def noted(fd: int) -> None:
        synchronized.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    async def run() -> None:
        async with opened(tmp_path) as store:
            monkeypatch.setattr(os, "fsync", noted)
            await put(store, b"picture")
            assert synchronized[1::2] == ["blobs", "files"]  # each after what is in it

    asyncio.run(run())


def test_the_room_is_known_while_another_thread_adds_groups(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, Quota(1 << 30)) as store:
            puts = asyncio.gather(*(put(store, b"picture", f"group {n}") for n in range(30)))
            while not puts.done():
                assert all(store.has_room("a") for _ in range(20))
                await asyncio.sleep(0)
            await puts

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asyncio.run(run())
    finally:
        sys.setswitchinterval(interval)


def ids(store: FileStore, group: str = "", **more: Any) -> list[str]:
    files, _ = store.listed(group, **{"limit": 100, **more})
    return [file.id for file in files]


def blobs(root: Path) -> list[Path]:
    return sorted(root.glob("*/blobs/*"))


def records(root: Path) -> list[Path]:
    return sorted(root.glob("*/files/*"))


def test_a_stored_file_is_found_before_and_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            files = [await put(store, b"data %d" % i, name=f"{i}.png") for i in range(3)]
            assert store.get("", files[0].id) == files[0]
        async with opened(tmp_path) as store:
            assert ids(store, order="asc") == [file.id for file in files]
            assert store.get("", files[1].id) == files[1]
            assert store.read("", files[1].id, 100) == b"data 1"

    asyncio.run(run())


def test_other_users_of_the_machine_cannot_enter_the_folder(tmp_path: Path) -> None:
    """Who can open the lock can hold it, and the next server could not start."""

    async def run() -> None:
        async with opened(tmp_path / "cache" / "files"):
            pass

    usual = os.umask(0o022)
    try:
        asyncio.run(run())
    finally:
        os.umask(usual)
    assert (tmp_path / "cache" / "files").stat().st_mode & 0o777 == 0o700


def test_ids_cannot_be_guessed(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            names = {(await put(store, b"same")).id for _ in range(20)}
        assert len(names) == 20
        assert all(name.startswith("file-") and len(name) >= 29 for name in names)

    asyncio.run(run())


def test_equal_contents_of_a_group_are_stored_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, Quota(max_bytes=10)) as store:
            first, second = await put(store, b"12345678"), await put(store, b"12345678")
            assert first.id != second.id
            assert len(blobs(tmp_path)) == 1
            await store.delete("", first.id)
            assert store.read("", second.id, 100) == b"12345678"
            await store.delete("", second.id)
            assert blobs(tmp_path) == records(tmp_path) == []
            await put(store, b"abcdefgh")  # the bytes are free again

    asyncio.run(run())


def test_files_of_another_group_are_not_found(tmp_path: Path) -> None:
    groups = ["", "a", "../../up", "a/b", "\0", "ä" * 300]

    async def run() -> None:
        async with opened(tmp_path) as store:
            owned = {group: (await put(store, b"same bytes", group)).id for group in groups}
            assert len(blobs(tmp_path)) == len(groups)
            for group in groups:
                assert ids(store, group) == [owned[group]]
                for other in set(owned.values()) - {owned[group]}:
                    with pytest.raises(UnknownFile):
                        store.get(group, other)
                    with pytest.raises(UnknownFile):
                        store.read(group, other, 100)
                    with pytest.raises(UnknownFile):
                        store.listed(group, after=other, limit=1)
                    with pytest.raises(UnknownFile):
                        await store.delete(group, other)
            await store.delete("a", owned["a"])
            assert ids(store, "") == [owned[""]]
        async with opened(tmp_path) as store:
            assert ids(store, "../../up") == [owned["../../up"]]
            assert ids(store, "a") == []

    asyncio.run(run())
    folders = {path.parents[1] for path in (*blobs(tmp_path), *records(tmp_path))}
    assert {len(path.name) for path in folders} == {32}  # hashes, whatever the names of the groups


@pytest.mark.parametrize(
    "file_id", ["", ".", "..", "../lock", "file-", "file-" + "0" * 32, "/etc/passwd", "a\0b", "ä"]
)
def test_an_unknown_id_is_not_found(tmp_path: Path, file_id: str) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            await put(store, b"data")
            with pytest.raises(UnknownFile):
                store.open("", file_id)
            with pytest.raises(UnknownFile):
                await store.delete("", file_id)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("photo.png", "photo.png"),
        ("фото 猫.png", "фото 猫.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\a.png", "a.png"),
        ("a\r\nSet-Cookie: x\0.png", "aSet-Cookie: x.png"),
        ("", "file"),
        ("dir/", "file"),
        ("x" * 1000, "x" * 255),
    ],
)
def test_a_filename_is_kept_but_never_used_as_a_path(tmp_path: Path, given: str, kept: str) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            file = await put(store, b"data", name=given)
        async with opened(tmp_path) as store:
            assert store.get("", file.id).filename == kept

    asyncio.run(run())
    assert [path.name for path in (*blobs(tmp_path), *records(tmp_path))] == [
        digest(b"data"),
        f"{records(tmp_path)[0].stem}.json",
    ]


def test_a_file_list_is_paginated(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            made = [(await put(store, b"%d" % i)).id for i in range(5)]
            other = (await store.put("", b"pdf", "a.pdf", "user_data", None)).id
            assert ids(store) == [other, *made[::-1]]
            assert ids(store, purpose="vision", order="asc") == made
            assert ids(store, purpose="batch") == []
            page, more = store.listed("", order="asc", limit=2)
            assert ([file.id for file in page], more) == (made[:2], True)
            page, more = store.listed("", order="asc", after=made[1], limit=4)
            assert ([file.id for file in page], more) == ([*made[2:], other], False)
            assert ids(store, after=made[0]) == []

    asyncio.run(run())


# ---------------------------------------------------------------------- quotas and expiry


@pytest.mark.parametrize(
    ("server", "group"),
    [
        (Quota(max_bytes=10), Quota()),
        (Quota(), Quota(max_bytes=10)),
        (Quota(max_files=1), Quota()),
        (Quota(), Quota(max_files=1)),
    ],
)
def test_a_full_quota_refuses_uploads_until_a_file_is_deleted(
    tmp_path: Path, server: Quota, group: Quota
) -> None:
    async def run() -> None:
        async with opened(tmp_path, server, group) as store:
            first = await put(store, b"12345678")
            with pytest.raises(FileQuotaExceeded):
                await put(store, b"abcdefgh")
            assert len(blobs(tmp_path)) == len(records(tmp_path)) == 1
            of_others = put(store, b"abcdefgh", "others")
            if group == Quota():
                with pytest.raises(FileQuotaExceeded):
                    await of_others
            else:
                await of_others
        async with opened(tmp_path, server, group) as store:  # existing files count
            with pytest.raises(FileQuotaExceeded):
                await put(store, b"abcdefgh")
            await store.delete("", first.id)
            if group != Quota():
                await put(store, b"abcdefgh")

    asyncio.run(run())


def test_concurrent_uploads_never_exceed_a_quota(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, Quota(max_bytes=50)) as store:
            uploads = (put(store, b"%010d" % (i % 12), "ab"[i % 2]) for i in range(60))
            results = await asyncio.gather(*uploads, return_exceptions=True)
            kept = [result for result in results if isinstance(result, StoredFile)]
            refused = [result for result in results if isinstance(result, FileQuotaExceeded)]
            assert len(kept) + len(refused) == 60
            assert refused
            assert len(blobs(tmp_path)) == 5
            assert sum(path.stat().st_size for path in blobs(tmp_path)) == 50
            groups = {file.id: group for group in "ab" for file in store.listed(group, limit=99)[0]}
            assert groups.keys() == {file.id for file in kept}
            gone = await asyncio.gather(
                *(store.delete(groups[file.id], file.id) for file in kept * 2),
                return_exceptions=True,
            )
            assert sum(isinstance(result, UnknownFile) for result in gone) == len(kept)
            assert blobs(tmp_path) == records(tmp_path) == []

    asyncio.run(run())


def test_an_expired_file_disappears_everywhere_at_once(tmp_path: Path) -> None:
    clock = Clock()

    async def run() -> None:
        async with opened(tmp_path, clock=clock) as store:
            kept, short = await put(store, b"kept"), await put(store, b"short", seconds=3600)
            assert short.expires_at == short.created_at + 3600
            clock.now += 3599
            assert set(ids(store)) == {kept.id, short.id}
            clock.now += 1
            assert ids(store) == [kept.id]
            for ask in (store.get, store.open):
                with pytest.raises(UnknownFile):
                    ask("", short.id)
            with pytest.raises(UnknownFile):
                await store.delete("", short.id)
        async with opened(tmp_path, clock=clock) as store:
            assert len(blobs(tmp_path)) == len(records(tmp_path)) == 1
            assert store.read("", kept.id, 100) == b"kept"

    asyncio.run(run())


@pytest.mark.parametrize("jump_s", [86_400, -86_400])
def test_a_jump_of_the_clock_neither_deletes_a_file_nor_keeps_it(
    tmp_path: Path, jump_s: float
) -> None:
    clock = Clock()

    async def run() -> None:
        async with opened(tmp_path, clock=clock) as store:
            early = await put(store, b"early", seconds=3600)
            clock.ahead_s = jump_s
            late = await put(store, b"late", seconds=3600)
            assert (late.created_at, late.expires_at) == (clock.time(), clock.time() + 3600)
            clock.now += 3599
            await store._in_writer(store._sweep)
            assert ids(store, order="asc") == [early.id, late.id]
            clock.now += 1
            assert ids(store) == []
            await store._in_writer(store._sweep)
            assert records(tmp_path) == []

    asyncio.run(run())


def test_a_file_of_a_clock_that_was_set_back_lives_no_longer_than_it_should(tmp_path: Path) -> None:
    clock = Clock()

    async def run() -> None:
        clock.ahead_s = 86_400
        async with opened(tmp_path, clock=clock) as store:
            await put(store, b"short", seconds=3600)
        clock.ahead_s = 0
        async with opened(tmp_path, clock=clock) as store:
            clock.now += 3599
            assert len(ids(store)) == 1
            clock.now += 1
            assert ids(store) == []

    asyncio.run(run())


def test_expired_files_are_swept_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_SWEEP_INTERVAL_S", 0.01)
    clock = Clock()

    async def run() -> None:
        async with opened(tmp_path, clock=clock) as store:
            await put(store, b"short", seconds=3600)
            clock.now += 3600
            while blobs(tmp_path) or records(tmp_path):  # the test's timeout ends it
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_expired_files_free_their_quota_and_lifetimes_are_capped(tmp_path: Path) -> None:
    clock = Clock()

    async def run() -> None:
        async with opened(tmp_path, Quota(max_files=1), clock=clock, ttl_s=5000) as store:
            file = await put(store, b"old", seconds=3600)
            assert file.expires_at == int(clock.time()) + 3600
            clock.now += 3600
            assert (await put(store, b"new")).expires_at == int(clock.time()) + 5000
            clock.now += 5000
            newest = await put(store, b"newest", seconds=9999)
            assert newest.expires_at == int(clock.time()) + 5000

    asyncio.run(run())


# ---------------------------------------------------------------------- crashes and damage

WRITER = """
import asyncio, sys
from pathlib import Path
from server.ingest.files import FileStore, Quota

async def main():
    async with FileStore(Path(sys.argv[1]), Quota(), Quota(), None) as store:
        number = 0
        while True:
            data = b"%d " % number * 30_000
            print((await store.put("", data, f"{number}.png", "vision", None)).id, flush=True)
            number += 1

asyncio.run(main())
"""


def test_a_killed_server_leaves_only_complete_files(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        told = [writer.stdout.readline().strip() for _ in range(20)]
        with pytest.raises(CannotStart, match="another server"):
            asyncio.run(_open_and_close(tmp_path))
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.read().split()
    (tmp_path / "partial" / ("0" * 32)).write_bytes(b"half an upl")
    orphan = records(tmp_path)[0].parents[1] / "blobs" / ("f" * 64)
    orphan.write_bytes(b"a blob whose record was not written")

    async def run() -> None:
        async with opened(tmp_path) as store:
            assert set(told) <= set(ids(store, limit=10_000))
            for number, file_id in enumerate(told):
                assert store.read("", file_id, 1 << 20) == b"%d " % number * 30_000
            assert len(blobs(tmp_path)) == len(records(tmp_path))
            assert list((tmp_path / "partial").iterdir()) == []

    asyncio.run(run())


async def _open_and_close(root: Path) -> None:
    async with opened(root):
        pass


def test_unrelated_files_in_the_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    theirs = [tmp_path / "partial" / "notes.txt", tmp_path / "blobs", tmp_path / "photo.png"]
    for path in theirs:
        path.write_text("theirs")
    asyncio.run(_open_and_close(tmp_path))
    assert [path.read_text() for path in theirs] == ["theirs"] * 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[:-9],
        lambda text: b"[]",
        lambda text: b"\xff" * 70_000,
        lambda text: text.replace(b'"file-', b'"file-0', 1),
        lambda text: text.replace(b'"digest":"', b'"digest":"../../', 1),
        lambda text: text.replace(b'"vision"', b'"other"'),
        lambda text: text.replace(b'"size":4', b'"size":5'),
        lambda text: text.replace(b'"size":4', b'"size":-1'),
    ],
)
def test_a_damaged_record_is_ignored(tmp_path: Path, damage: Any) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            lost, kept = await put(store, b"lost"), await put(store, b"kept")
        (path,) = (path for path in records(tmp_path) if path.stem == lost.id)
        text = path.read_bytes()
        path.write_bytes(damage(text))
        assert path.read_bytes() != text
        async with opened(tmp_path) as store:
            assert ids(store) == [kept.id]
            assert [path.name for path in blobs(tmp_path)] == [digest(b"kept")]

    asyncio.run(run())


def test_a_file_with_truncated_content_is_not_served(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            file = await put(store, b"content")
            (blob,) = blobs(tmp_path)
            blob.write_bytes(b"cont")
            with pytest.raises(FileStorageFailed):
                store.read("", file.id, 100)
            again = await put(store, b"content")  # a new upload repairs it
            assert store.read("", again.id, 100) == store.read("", file.id, 100) == b"content"
            blob.unlink()
            with pytest.raises(UnknownFile):
                store.read("", file.id, 100)
        async with opened(tmp_path) as store:
            assert ids(store) == []

    asyncio.run(run())


def test_a_file_over_a_lowered_limit_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            file = await put(store, b"12345")
            assert store.read("", file.id, 5) == b"12345"
            with pytest.raises(ImageTooLarge):
                store.read("", file.id, 4)

    asyncio.run(run())


def test_a_failing_disk_is_reported_and_changes_no_state(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            kept = await put(store, b"kept")
            folder = records(tmp_path)[0].parents[1]
            folder.rename(tmp_path / "away")
            folder.write_text("a file where a folder was")
            with pytest.raises(FileStorageFailed):
                await put(store, b"more")
            assert ids(store) == [kept.id]
            assert list((tmp_path / "partial").iterdir()) == []
            folder.unlink()
            (tmp_path / "away").rename(folder)
            await put(store, b"more")
            assert len(ids(store)) == 2

    asyncio.run(run())


def test_an_upload_without_a_free_file_descriptor_can_be_retried(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            await put(store, b"kept")  # starts the thread that writes
            with no_free_files(), pytest.raises(ServerBusy):
                await put(store, b"more")
            await put(store, b"more")
            assert len(ids(store)) == 2

    asyncio.run(run())


def test_an_unusable_folder_prevents_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match="--files-dir"):
        asyncio.run(_open_and_close(tmp_path / "file"))
    (tmp_path / "store" / "lock").mkdir(parents=True)
    with pytest.raises(CannotStart, match="--files-dir"):
        asyncio.run(_open_and_close(tmp_path / "store"))

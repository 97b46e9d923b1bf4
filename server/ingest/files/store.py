"""The stored files of all groups: found by id, limited by quotas, removed when they expire."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, Self, TypeVar

from blake3 import blake3

from server.concurrency import cancel
from server.errors import FileQuotaExceeded, FileStorageFailed, SaccadeError
from server.imaging.encoded import digest
from server.ingest.clock import Clock
from server.ingest.files.disk import (
    UPLOAD_PURPOSES,
    FileDisk,
    Purpose,
    StoredFile,
    group_name,
    new_file,
    read_whole,
    translated,
    unknown_file,
)
from server.telemetry import metrics

T = TypeVar("T")

log = logging.getLogger("saccade")

_SWEEP_INTERVAL_S = 30.0
_CHUNK_BYTES = 1 << 20
# An unfinished batch keeps its input, even if the client deletes the file, as a file of its own.
_LISTED = frozenset({*UPLOAD_PURPOSES, "batch_output"})


@dataclass(frozen=True)
class Quota:
    """The most bytes on the disk and the most files; None: no limit."""

    max_bytes: int | None = None
    max_files: int | None = None


class _Kept(NamedTuple):
    """A file, and when it expires, in seconds on the monotonic clock; None: never."""

    file: StoredFile
    until: float | None

    def is_expired(self, now: float) -> bool:
        return self.until is not None and self.until <= now


@dataclass
class _Group:
    """The files of one group by id, oldest first. `uses` counts the files of each digest; `nbytes`
    counts each content once. `logged` is the bytes of results of unfinished batches."""

    files: dict[str, _Kept] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    logged: int = 0

    def add(self, kept: _Kept) -> None:
        file = kept.file
        self.files[file.id] = kept
        self.nbytes += 0 if self.uses[file.digest] else file.size
        self.uses[file.digest] += 1

    def remove(self, file: StoredFile) -> None:
        del self.files[file.id]
        self.uses[file.digest] -= 1
        if not self.uses[file.digest]:
            del self.uses[file.digest]
            self.nbytes -= file.size


class FileStore:
    """Stores files below `root` while its `async with` block is open.

    One thread makes all changes, one after another. Readers on the event loop and in other threads
    always find a consistent index, since a single dict operation makes each change visible.

    A file expires at a time of day, which its client knows. How long that takes is computed when
    the file is stored and when the server starts, so a clock that jumps meanwhile changes nothing.
    """

    def __init__(
        self,
        root: Path,
        server: Quota,
        group: Quota,
        ttl_s: int | None,
        clock: Clock = time,
    ) -> None:
        """`server` limits the files of all groups together, `group` those of each; no file lives
        longer than `ttl_s`."""
        self._disk = FileDisk(root)
        self._server_quota = server
        self._group_quota = group
        self._ttl_s = ttl_s
        self._clock = clock
        self._groups: dict[str, _Group] = {}
        self._writer = ThreadPoolExecutor(1, "file-store")
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises CannotStart."""
        try:
            await self._in_writer(self._start)
        except BaseException:
            self._writer.shutdown()
            self._disk.close()
            raise
        self._sweeper = asyncio.create_task(self._sweep_periodically())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._sweeper is not None
        await cancel(self._sweeper)
        await asyncio.to_thread(self._writer.shutdown)
        self._disk.close()

    # ------------------------------------------------------------------ reading

    def get(self, group: str, file_id: str) -> StoredFile:
        """Raises UnknownFile: never known to `group`, deleted or expired."""
        return self._found(group_name(group), file_id)

    def listed(
        self,
        group: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        limit: int,
    ) -> tuple[list[StoredFile], bool]:
        """At most `limit` files in order of creation, starting behind the file `after`; and whether
        there are more. Takes time proportional to the number of files.

        Raises:
            UnknownFile: the file `after` does not exist.
        """
        if after is not None:
            self.get(group, after)
        index, now = self._groups.get(group_name(group), _Group()), self._clock.monotonic()
        files = list(index.files.values())
        rest: Iterator[_Kept] = iter(files if order == "asc" else reversed(files))
        if after is not None:
            rest = itertools.dropwhile(lambda kept: kept.file.id != after, rest)
            next(rest, None)
        found = (
            kept.file
            for kept in rest
            if kept.file.purpose in _LISTED
            and purpose in (None, kept.file.purpose)
            and not kept.is_expired(now)
        )
        page = list(itertools.islice(found, limit + 1))
        return page[:limit], len(page) > limit

    def open(self, group: str, file_id: str) -> tuple[StoredFile, BinaryIO]:
        """Open the content of a file for reading; returns its record too. Blocks.

        Raises:
            UnknownFile, FileStorageFailed
        """
        folder = group_name(group)
        file = self._found(folder, file_id)
        return file, self._disk.open_blob(folder, file)

    def read(self, group: str, file_id: str, max_bytes: int) -> bytes:
        """Read the content of a file. Blocks.

        Raises:
            UnknownFile, FileStorageFailed
            ImageTooLarge: the file has more than `max_bytes`.
        """
        file, content = self.open(group, file_id)
        return read_whole(file, content, max_bytes)

    def _found(self, folder: str, file_id: str) -> StoredFile:
        index = self._groups.get(folder)
        kept = index.files.get(file_id) if index else None
        if kept is None or kept.is_expired(self._clock.monotonic()):
            raise unknown_file()
        return kept.file

    def _kept(self, file: StoredFile) -> _Kept:
        left_s = file.left_s(self._clock.time())
        return _Kept(file, None if left_s is None else self._clock.monotonic() + left_s)

    # ------------------------------------------------------------------ changing

    async def put(
        self,
        group: str,
        data: bytes | memoryview,
        filename: str,
        purpose: Purpose,
        lifetime_s: int | None,
    ) -> StoredFile:
        """Store `data` for `group`, for `lifetime_s` seconds or for the longest lifetime allowed.

        Raises:
            FileQuotaExceeded, FileStorageFailed
        """
        return await self._in_writer(
            self._put, group_name(group), data, filename, purpose, lifetime_s
        )

    async def delete(self, group: str, file_id: str) -> None:
        """Raises UnknownFile, FileStorageFailed."""
        await self._in_writer(self._delete, group_name(group), file_id)

    # ------------------------------------------------------------------ for batches

    async def keep_input(self, group: str, file_id: str) -> StoredFile:
        """Store a file once more, for a batch: without an end, and not listed.

        Raises:
            UnknownFile, FileQuotaExceeded, FileStorageFailed
        """
        return await self._in_writer(self._keep_input, group_name(group), file_id)

    async def adopt(
        self, group: str, path: Path, filename: str, file_id: str, lifetime_s: int | None
    ) -> None:
        """Store the results of a batch, at `path` in `folder`, under `file_id`, whatever the
        quotas are. Does nothing if that was done.

        Raises:
            FileStorageFailed
        """
        await self._in_writer(self._adopt, group_name(group), path, filename, file_id, lifetime_s)

    async def drop_inputs(self, but: Collection[str]) -> None:
        """Remove the files that were kept for batches that no longer need them: all but these."""
        await self._in_writer(self._drop_inputs, frozenset(but))

    def folder(self, group: str) -> Path:
        """The folder of the batches of `group`, which may not exist."""
        return self._disk.group_folder(group_name(group)) / "batches"

    def folders(self) -> list[Path]:
        """The folders of the batches of all groups, which may not exist."""
        return [folder / "batches" for folder in self._disk.group_folders()]

    def write(self, path: Path, data: bytes) -> None:
        """Write a file in `folder`, all at once. Blocks. Raises FileStorageFailed."""
        self._disk.write(path, data)

    def log(self, group: str, nbytes: int) -> None:
        """Count bytes of results of unfinished batches; negative when they are gone."""
        self._groups.setdefault(group_name(group), _Group()).logged += nbytes

    def has_room(self, group: str) -> bool:
        """Whether more results of batches may be written for `group`."""
        index = self._groups.get(group_name(group), _Group())
        nbytes, _ = self._totals()
        return all(
            quota.max_bytes is None or held < quota.max_bytes
            for quota, held in (
                (self._server_quota, nbytes),
                (self._group_quota, index.nbytes + index.logged),
            )
        )

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work`, which changes files in a `folder`, after other changes."""
        return await self._in_writer(work, *args)

    async def _in_writer(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *args)

    # ------------------------------------------------------------------ in the writer's thread

    def _start(self) -> None:
        self._disk.open()
        for folder, files in self._disk.load():
            index = self._groups[folder] = _Group()
            for file in files:
                index.add(self._kept(file))
        self._sweep()
        self._count()

    def _put(
        self,
        folder: str,
        data: bytes | memoryview,
        filename: str,
        purpose: Purpose,
        lifetime_s: int | None,
    ) -> StoredFile:
        now, lifetime_s = self._clock.time(), self._lifetime_s(lifetime_s)
        file = new_file(digest(data), len(data), filename, purpose, now, lifetime_s)
        self._make_room(folder, file)
        index = self._groups.setdefault(folder, _Group())
        try:
            if not self._disk.has_blob(folder, file):
                self._disk.write_blob(folder, file, data)
            self._disk.write_record(folder, file)
        except SaccadeError:
            if file.digest not in index.uses:
                self._disk.remove_blob(folder, file.digest)
            raise
        index.add(self._kept(file))
        self._count()
        return file

    def _lifetime_s(self, asked: int | None) -> int | None:
        return min((each for each in (asked, self._ttl_s) if each is not None), default=None)

    def _keep_input(self, folder: str, file_id: str) -> StoredFile:
        given = self._found(folder, file_id)
        now = self._clock.time()
        file = new_file(given.digest, given.size, given.filename, "batch_input", now, None)
        self._make_room(folder, file)
        self._disk.write_record(folder, file)
        self._groups[folder].add(self._kept(file))
        self._count()
        return file

    def _drop_inputs(self, but: frozenset[str]) -> None:
        for folder, index in self._groups.items():
            for file in [kept.file for kept in index.files.values()]:
                if file.purpose == "batch_input" and file.id not in but:
                    with contextlib.suppress(FileStorageFailed):  # logged
                        self._remove(folder, file)
        self._count()

    def _adopt(
        self, folder: str, path: Path, filename: str, file_id: str, lifetime_s: int | None
    ) -> None:
        index = self._groups.setdefault(folder, _Group())
        if file_id in index.files:
            return
        hashed, size = blake3(), 0
        with translated(), path.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                hashed.update(chunk)
                size += len(chunk)
        now, lifetime_s = self._clock.time(), self._lifetime_s(lifetime_s)
        file = new_file(
            hashed.hexdigest(), size, filename, "batch_output", now, lifetime_s, file_id
        )
        self._disk.link_blob(folder, file, path)
        self._disk.write_record(folder, file)
        index.add(self._kept(file))
        self._count()

    def _make_room(self, folder: str, file: StoredFile) -> None:
        """Raises FileQuotaExceeded."""
        try:
            self._check_quotas(folder, file)
        except FileQuotaExceeded:
            self._sweep()
            self._check_quotas(folder, file)

    def _check_quotas(self, folder: str, file: StoredFile) -> None:
        index = self._groups.get(folder, _Group())
        more = 0 if file.digest in index.uses else file.size
        nbytes, count = self._totals()
        _check(self._server_quota, nbytes + more, count + 1, "the server")
        held = index.nbytes + index.logged
        _check(self._group_quota, held + more, len(index.files) + 1, "your group")

    def _delete(self, folder: str, file_id: str) -> None:
        self._remove(folder, self._found(folder, file_id))
        self._count()

    def _remove(self, folder: str, file: StoredFile) -> None:
        self._disk.remove_record(folder, file)
        index = self._groups[folder]
        index.remove(file)
        if file.digest not in index.uses:
            self._disk.remove_blob(folder, file.digest)

    def _sweep(self) -> None:
        """Remove expired files."""
        now = self._clock.monotonic()
        for folder, index in list(self._groups.items()):
            for kept in [kept for kept in index.files.values() if kept.is_expired(now)]:
                with contextlib.suppress(FileStorageFailed):  # logged; the next sweep tries again
                    self._remove(folder, kept.file)
        self._count()

    async def _sweep_periodically(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            await self._in_writer(self._sweep)

    def _totals(self) -> tuple[int, int]:
        """Bytes and number of all files."""
        groups = list(self._groups.values())  # another thread may add one meanwhile
        nbytes = sum(group.nbytes + group.logged for group in groups)
        return nbytes, sum(len(group.files) for group in groups)

    def _count(self) -> None:
        nbytes, count = self._totals()
        metrics.file_bytes.set(nbytes)
        metrics.files.set(count)


def _check(quota: Quota, nbytes: int, count: int, whose: str) -> None:
    """Raises FileQuotaExceeded."""
    if quota.max_bytes is not None and nbytes > quota.max_bytes:
        raise FileQuotaExceeded(
            f"with this file, {whose} would exceed its limit of {quota.max_bytes} bytes"
        )
    if quota.max_files is not None and count > quota.max_files:
        raise FileQuotaExceeded(
            f"with this file, {whose} would exceed its limit of {quota.max_files} files"
        )

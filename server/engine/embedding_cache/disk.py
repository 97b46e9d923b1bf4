"""The tier on a local disk: one file per entry, in a directory that outlives the server.

DIRECTORY/NAMESPACE/ab/abcdef....safetensors

Files appear complete, by renaming. Several servers may share a directory: each one finds the
entries of the others, and a shared count keeps all of them together within the limit. Files with
other names are not touched.
"""

import contextlib
import fcntl
import glob
import os
import re
import secrets
import stat
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from server.engine.embedding_cache.index import S3Fifo
from server.engine.embedding_cache.tier import (
    LENGTH_BYTES,
    Breaker,
    Counts,
    DamagedEntry,
    Spec,
    check_data,
    check_head,
    checksum,
    head,
    header_length,
)
from server.errors import full_disk

_SUFFIX = ".safetensors"
_UNFINISHED = ".part"
_NAME = re.compile(r"[0-9a-f]{64}(\.safetensors|\.[0-9a-f]{16}\.part)")
_SCAN_INTERVAL_S = 60.0
_NUMBER = struct.Struct("<Q")
_LONGEST_WAIT_S = 5.0
_POLL_INTERVAL_S = 0.002


@dataclass
class UsageCount:
    """The bytes that all servers keep in a directory; None before the first scan."""

    nbytes: int | None
    _fd: int

    def add(self, nbytes: int) -> None:
        """Count bytes before they are written."""
        self.nbytes = (self.nbytes or 0) + nbytes
        self.save()

    def save(self) -> None:
        if self.nbytes is not None:
            os.pwrite(self._fd, _NUMBER.pack(max(0, self.nbytes)), 0)


class Usage:
    """The bytes that all servers keep in a directory: a number in the file `path`.

    A file is counted before it is written and until after it is deleted, so a server that is killed
    leaves the number too high until the next scan, but never too low.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[UsageCount]:
        """The count, locked against other threads and servers, and saved at the end.

        Raises:
            OSError: the file cannot be used; TimeoutError if another server keeps it locked.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(fd)
            data = os.pread(fd, _NUMBER.size, 0)
            before = _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else None
            count = UsageCount(before, fd)
            try:
                yield count
            finally:
                count.save()
        finally:
            os.close(fd)


def _lock(fd: int) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("another server keeps the cache directory locked") from None
        time.sleep(_POLL_INTERVAL_S)


def _is_locked(path: Path) -> bool:
    """Whether a thread or a server writes the file, which may be gone."""
    try:
        with FileIO(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except FileNotFoundError:
        return False
    return False


class DiskTier:
    """The entries of one model in a directory, limited to `max_bytes` together with those of other
    models. Keys are 64 hexadecimal digits."""

    name = "disk"

    def __init__(self, directory: Path, namespace: str, max_bytes: int) -> None:
        """Raises OSError if the directory cannot be created, read or written, but not if its disk
        is full, since room may become free."""
        self.counts = Counts()
        self.breaker = Breaker()
        self._root = directory
        self._folder = directory / namespace
        self._max_bytes = max_bytes
        self._usage = Usage(directory / "saccade-usage")
        self._lock = threading.Lock()  # protects the fields below
        self._sizes: dict[Path, int] = {}
        self._order: S3Fifo[Path] = S3Fifo()
        self._bytes = 0
        self._scan_at = 0.0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._usage.locked() as usage:
                self._scan(usage)
                self._make_room(0, usage)
        except OSError as error:
            if full_disk(error) is None:
                raise

    def read(self, key: str, spec: Spec, into: Sequence[memoryview]) -> bool:
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                self._read(file.fileno(), key, spec, into)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        except DamagedEntry:
            self.delete(key)
            raise
        self._use(path, size)
        return True

    @staticmethod
    def _read(fd: int, key: str, spec: Spec, into: Sequence[memoryview]) -> None:
        start = os.read(fd, LENGTH_BYTES)
        header = os.read(fd, header_length(start))
        digest = check_head(header, key, spec)
        for piece in into:
            filled = 0
            while filled < len(piece):
                if not (count := os.readv(fd, [piece[filled:]])):
                    raise DamagedEntry("the entry is truncated")
                filled += count
        if os.read(fd, 1):
            raise DamagedEntry("the entry is too long")
        check_data(into, digest)

    def write(self, key: str, spec: Spec, data: Sequence[memoryview]) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            self._use(path, path.stat().st_size)
            return  # the next reader deletes it if it is damaged
        start = head(key, spec, checksum(data))
        size = len(start) + spec.nbytes
        part = path.with_suffix(f".{secrets.token_hex(8)}{_UNFINISHED}")
        try:
            file = self._reserve(part, size)
            if file is None:
                self.counts.add("dropped")
                return
            with file:
                for piece in (memoryview(start), *data):
                    written = 0
                    while written < len(piece):
                        written += file.write(piece[written:])
                with self._usage.locked():  # no scan runs meanwhile
                    part.replace(path)
        except BaseException:
            self._give_up(part, size)
            raise
        with self._lock:
            self._note(path, size)

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        with self._lock:
            self._forget(path)

    def clear(self) -> None:
        for _, path, _ in self._files():
            if path.suffix == _SUFFIX and path.is_relative_to(self._folder):
                path.unlink(missing_ok=True)
        if self._root.is_dir():  # else the directory was deleted
            with self._usage.locked() as usage:
                self._scan(usage)

    def size(self) -> dict[str, int | None]:
        with self._lock:
            held = {"entries": len(self._sizes), "bytes": self._bytes}
        return {**held, "max_bytes": self._max_bytes}

    def close(self) -> None: ...

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{_SUFFIX}"

    # ------------------------------------------------------------------ space

    def _reserve(self, part: Path, size: int) -> FileIO | None:
        """Create a file of `size` bytes to write to, which is locked while it is open; None if
        there is no room for it."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._usage.locked() as usage:
            if usage.nbytes is None or time.monotonic() > self._scan_at:
                self._scan(usage)
            if not self._make_room(size, usage):
                return None
            part.parent.mkdir(parents=True, exist_ok=True)
            usage.add(size)
            file = FileIO(part, "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(size)
            except BaseException:
                file.close()
                raise
        return file

    def _give_up(self, part: Path, size: int) -> None:
        with contextlib.suppress(OSError):
            part.unlink()
            with self._usage.locked() as usage:
                if usage.nbytes is not None:
                    usage.nbytes -= size

    def _make_room(self, size: int, usage: UsageCount) -> bool:
        """Delete files until `size` bytes are free; False if that is impossible."""
        may_scan = True
        while (usage.nbytes or 0) + size > self._max_bytes:
            if size > self._max_bytes:
                return False
            with self._lock:
                path = self._order.evict()
                known = self._forget(path) if path is not None else 0
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                    usage.nbytes = (usage.nbytes or 0) - known
                    self.counts.add("evictions")
            elif may_scan:
                self._scan(usage)  # finds the files of other servers
                may_scan = False
            else:
                return False
        return True

    # ------------------------------------------------------------------ known files

    def _use(self, path: Path, size: int) -> None:
        """Record a use of a file, also for other servers and the next start."""
        with contextlib.suppress(OSError):
            os.utime(path)
        with self._lock:
            self._note(path, size)
            self._order.hit(path)

    def _note(self, path: Path, size: int) -> None:
        """Add a file to the index. Call it with the lock held."""
        if path not in self._sizes:
            self._order.add(path)
        self._bytes += size - self._sizes.get(path, 0)
        self._sizes[path] = size

    def _forget(self, path: Path) -> int:
        """Remove a file from the index; returns its size. Call it with the lock held."""
        size = self._sizes.pop(path, 0)
        self._order.discard(path)
        self._bytes -= size
        return size

    def _scan(self, usage: UsageCount) -> None:
        """Count all files, add unknown ones to the index, oldest first, and delete those whose
        writer has ended. Call it with the usage locked, so that no file is between its creation and
        its lock."""
        self._scan_at = time.monotonic() + _SCAN_INTERVAL_S
        total, present = 0, set()
        for _, path, size in sorted(self._files()):
            if path.suffix == _UNFINISHED and not _is_locked(path):
                path.unlink(missing_ok=True)
                continue
            total += size
            if path.suffix == _SUFFIX:
                present.add(path)
                with self._lock:
                    self._note(path, size)
        usage.nbytes = total
        with self._lock:
            for path in self._sizes.keys() - present:
                self._forget(path)

    def _files(self) -> Iterator[tuple[float, Path, int]]:
        """(time of last use, path, size) of each file of any model's tier."""
        for name in glob.iglob("*/[0-9a-f][0-9a-f]/*", root_dir=self._root):
            path = self._root / name
            if _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # other servers delete files too
                    found = path.lstat()
                    if stat.S_ISREG(found.st_mode):
                        yield found.st_mtime, path, found.st_size

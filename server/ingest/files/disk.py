"""The folder of stored files: its layout, and how it stays consistent.

    <root>/lock                         held by the server that uses the folder
    <root>/partial/<random>             being written
    <root>/<group>/blobs/<digest>       contents, each once
    <root>/<group>/files/<id>.json      one record a file

Each file is written to `partial` and then renamed. A blob is written before its record and removed
after it. So a killed server leaves at most partial files and blobs without a record, and the next
one removes them. Names on the disk are hashes and generated ids, never a client's text. All methods
block.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, get_args

import msgspec
from blake3 import blake3
from msgspec import Meta

from server.errors import (
    CannotStart,
    FilesDisabled,
    FileStorageFailed,
    ImageTooLarge,
    ServerBusy,
    UnknownFile,
    busy_for_files,
    full_disk,
)

log = logging.getLogger("saccade")

# What clients may upload a file for, and what else the server stores.
UploadPurpose = Literal["vision", "user_data", "batch"]
Purpose = Literal[UploadPurpose, "batch_input", "batch_output"]
UPLOAD_PURPOSES: tuple[UploadPurpose, ...] = get_args(UploadPurpose)

_MAX_FILENAME_CHARS = 255
_NS_PER_S = 1_000_000_000

_GROUP = re.compile(r"[0-9a-f]{32}")
_ID = re.compile(r"file-[0-9a-f]{32}")
_PARTIAL = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_RECORD_BYTES = 64 * 1024


class StoredFile(msgspec.Struct, frozen=True):
    """The record of a stored file.

    Attributes:
        digest: the hash of the content.
        size: in bytes.
        filename: the client's name for it, which names nothing on the disk.
        created_ns: in nanoseconds since 1970.
        expires_at: in seconds since 1970; None: never.
    """

    id: Annotated[str, Meta(pattern=r"\Afile-[0-9a-f]{32}\Z")]
    digest: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    size: Annotated[int, Meta(ge=1)]
    filename: str
    purpose: Purpose
    created_ns: Annotated[int, Meta(ge=0)]
    expires_at: int | None

    @property
    def created_at(self) -> int:
        """In seconds since 1970."""
        return self.created_ns // _NS_PER_S

    def left_s(self, now: float) -> float | None:
        """For how long the file lives on if the clock that shows `now`, in seconds since 1970, is
        right; None: for ever. At most the lifetime that it had at first, which `now` exceeds if the
        clock was set back."""
        if self.expires_at is None:
            return None
        return min(self.expires_at - now, self.expires_at - self.created_at)


_RECORDS = msgspec.json.Decoder(StoredFile)


def group_name(group: str) -> str:
    """The name of a group's folder: 32 hex digits, derived from the name of the group."""
    return blake3(group.encode()).hexdigest()[:32]


def read_whole(file: StoredFile, content: BinaryIO, max_bytes: int) -> bytes:
    """Read the `content` of `file`, and close it. Blocks.

    Raises:
        FileStorageFailed
        ImageTooLarge: it has more than `max_bytes`.
    """
    with content:
        if file.size > max_bytes:
            raise ImageTooLarge(f"the file has {file.size} bytes, the limit is {max_bytes} bytes")
        try:
            return content.read()
        except OSError as error:
            log.error("--files-dir: %s", error)
            raise FileStorageFailed("the stored file cannot be read") from None


def new_id() -> str:
    """An id of a file, which cannot be guessed."""
    return f"file-{secrets.token_hex(16)}"


def new_file(
    digest: str,
    size: int,
    filename: str,
    purpose: Purpose,
    now: float,
    lifetime_s: int | None,
    file_id: str | None = None,
) -> StoredFile:
    """A record, by default with a new id. `now` is in seconds since 1970."""
    return StoredFile(
        id=file_id or new_id(),
        digest=digest,
        size=size,
        filename=_base_name(filename),
        purpose=purpose,
        created_ns=int(now * _NS_PER_S),
        expires_at=None if lifetime_s is None else int(now) + lifetime_s,
    )


def unknown_file() -> UnknownFile:
    """The same error for files that never existed, are gone, or belong to another group."""
    return UnknownFile("there is no such file; it may have been deleted or have expired")


def files_disabled() -> FilesDisabled:
    """The error where a server has no store."""
    return FilesDisabled(
        "the Files API is off: the server was started with --no-files, or cannot use the folder "
        "of --files-dir"
    )


def _base_name(filename: str) -> str:
    """The last component of `filename`, without control characters."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, name))[:_MAX_FILENAME_CHARS] or "file"


class FileDisk:
    """Blobs and records below `root`. `group` is the name of a group's folder: 32 hex digits."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._partial = root / "partial"
        self._lock: BinaryIO | None = None

    def open(self) -> None:
        """Create the folder if it is missing, and lock it until `close`.

        Raises:
            CannotStart: it cannot be written, or another server uses it.
        """
        try:
            # The mode is for the last folder only. Who can open the lock can hold it.
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._partial.mkdir(mode=0o700, exist_ok=True)
            # A lock of the process, not of the descriptor: forked children do not inherit it.
            self._lock = (self._root / "lock").open("wb")
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.close()
                raise CannotStart(f"--files-dir {self._root}: another server uses it") from None
            for path in self._partial.iterdir():
                if _PARTIAL.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            self.close()
            raise CannotStart(f"--files-dir {self._root}: {error.strerror}") from None

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ------------------------------------------------------------------ at the start

    def load(self) -> Iterator[tuple[str, list[StoredFile]]]:
        """Yield each group with its records, oldest first. Ignores damaged records, and removes
        blobs without a record.

        Raises:
            CannotStart: the folder cannot be read.
        """
        try:
            for folder in self.group_folders():
                records = self._records(folder)
                self._remove_unused(folder, {record.digest for record in records})
                yield folder.name, records
        except OSError as error:
            raise CannotStart(f"--files-dir {self._root}: {error.strerror}") from None

    def _records(self, folder: Path) -> list[StoredFile]:
        records = []
        for path in (folder / "files").glob("*.json"):
            try:
                with path.open("rb") as file:
                    text = file.read(_MAX_RECORD_BYTES)
                record = _RECORDS.decode(text)
                if path.stem != record.id or not self.has_blob(folder.name, record):
                    raise ValueError("its blob is missing or has another size")
                records.append(record)
            except (OSError, ValueError) as error:  # ValueError is also msgspec's
                log.warning("ignoring stored file %s: %s", path, error)
        return sorted(records, key=lambda record: (record.created_ns, record.id))

    def find_record(self, group: str, file_id: str) -> StoredFile | None:
        """The record of a file; None if there is none, or a damaged one."""
        if not _ID.fullmatch(file_id):
            return None
        try:
            record = _RECORDS.decode(self._record(group, file_id).read_bytes())
        except (OSError, ValueError):  # ValueError is also msgspec's
            return None
        return record if record.id == file_id else None

    def _remove_unused(self, folder: Path, used: set[str]) -> None:
        for path in (folder / "blobs").glob("*"):
            if _DIGEST.fullmatch(path.name) and path.name not in used:
                path.unlink()

    # ------------------------------------------------------------------ blobs and records

    def has_blob(self, group: str, record: StoredFile) -> bool:
        """Whether the content of `record` exists, in full length."""
        try:
            return self._blob(group, record.digest).stat().st_size == record.size
        except OSError:
            return False

    def open_blob(self, group: str, record: StoredFile) -> BinaryIO:
        """Open the content of `record`, which stays readable if it is removed later.

        Raises:
            UnknownFile: it was removed.
            FileStorageFailed
        """
        with translated():
            try:
                file = self._blob(group, record.digest).open("rb")
            except FileNotFoundError:
                raise unknown_file() from None
        if os.fstat(file.fileno()).st_size != record.size:
            file.close()
            raise FileStorageFailed("the stored file is damaged")
        return file

    def write_blob(self, group: str, record: StoredFile, data: bytes | memoryview) -> None:
        """Raises FileStorageFailed."""
        self.write(self._blob(group, record.digest), data)

    def link_blob(self, group: str, record: StoredFile, path: Path) -> None:
        """Make the file at `path`, in the same folder of the group, the content of `record`.

        Raises FileStorageFailed."""
        blob = self._blob(group, record.digest)
        with translated():
            blob.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                blob.hardlink_to(path)
            synchronize(blob.parent)

    def write_record(self, group: str, record: StoredFile) -> None:
        """Raises FileStorageFailed."""
        self.write(self._record(group, record.id), msgspec.json.encode(record))

    def remove_record(self, group: str, record: StoredFile) -> None:
        """Raises FileStorageFailed."""
        with translated():
            self._record(group, record.id).unlink(missing_ok=True)

    def remove_blob(self, group: str, digest: str) -> None:
        """Remove a blob that no record needs. If that fails, the next start removes it."""
        try:
            self._blob(group, digest).unlink(missing_ok=True)
        except OSError as error:
            log.warning("failed to remove the content of a deleted file: %s", error)

    def group_folder(self, group: str) -> Path:
        return self._root / group

    def group_folders(self) -> list[Path]:
        """The folders of all groups that have ever stored something."""
        return [folder for folder in self._root.iterdir() if _GROUP.fullmatch(folder.name)]

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file below `group_folder`, all at once. Raises FileStorageFailed."""
        partial = self._partial / secrets.token_hex(16)
        try:
            with translated():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                partial.rename(path)
                synchronize(path.parent)
        except (FileStorageFailed, ServerBusy):
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def _blob(self, group: str, digest: str) -> Path:
        return self._root / group / "blobs" / digest

    def _record(self, group: str, file_id: str) -> Path:
        return self._root / group / "files" / f"{file_id}.json"


def synchronize(folder: Path) -> None:
    """Make the names in `folder` survive a power failure. Blocks. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raises ServerBusy or FileStorageFailed for an error of the disk."""
    try:
        yield
    except OSError as error:
        if (busy := busy_for_files(error)) is not None:
            raise busy from None
        log.error("--files-dir: %s", error)
        raise full_disk(error) or _unusable() from None


def _unusable() -> FileStorageFailed:
    return FileStorageFailed("the server cannot read or write its stored files")

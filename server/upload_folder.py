"""Where uploaded files are, for each of the processes that share them."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from server.errors import CannotStart
from server.front_ends import FrontEnd
from server.ingest.files import FileReader, FileStore, Quota
from server.replica import Replica
from server.settings import GIB, Settings

# Disk space for files in a folder that the operator chose, and in the default folder, in GiB.
_FILES_GB, _DEFAULT_FILES_GB = 10.0, 1.0

Report = Callable[[str], None]


async def files_of(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    report: Report,
    peer: FrontEnd | Replica | None,
) -> tuple[FileStore | None, FileStore | FileReader | None]:
    """The store of uploaded files, if this process has it, and where to read them."""
    if peer is not None and not peer.is_first:
        return None, _files_of_first(settings, peer)
    store = await stack.enter_async_context(file_store(settings, report))
    if peer is not None:
        _tell_of_files(peer, store is not None)
    return store, store


def _tell_of_files(mine: FrontEnd | Replica, has_files: bool) -> None:
    marker = mine.files_marker()
    if has_files:
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def _files_of_first(settings: Settings, mine: FrontEnd | Replica) -> FileReader | None:
    """The files that the first front end has, if its folder can be used."""
    if not settings.files.files:
        return None
    try:
        return FileReader(_files_folder(settings), marker=mine.files_marker())
    except CannotStart:  # there is no folder
        return None


def _files_folder(settings: Settings) -> Path:
    return settings.files.files_dir or _cache_folder() / "saccade" / "files"


@contextlib.asynccontextmanager
async def file_store(settings: Settings, report: Report) -> AsyncIterator[FileStore | None]:
    """The store of uploaded files; None if it is off, or if the default folder cannot be used.

    Raises:
        CannotStart: the folder that was asked for cannot be used.
    """
    given = settings.files
    if not given.files:
        yield None
        return
    has_folder = given.files_dir is not None
    gib = given.files_gb or (_FILES_GB if has_folder else _DEFAULT_FILES_GB)
    group_bytes = None if given.files_group_gb is None else int(given.files_group_gb * GIB)
    store = None
    async with contextlib.AsyncExitStack() as stack:
        try:
            made = FileStore(
                _files_folder(settings),
                Quota(int(gib * GIB), given.files_count),
                Quota(group_bytes, given.files_group_count),
                given.files_ttl_s,
            )
            store = await stack.enter_async_context(made)
        except CannotStart as error:
            if has_folder:
                raise
            report(f"the Files API is off: {error}")
        yield store


def _cache_folder() -> Path:
    """The user's folder for caches (XDG Base Directory Specification: a relative path is ignored).

    Raises:
        CannotStart: the user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return given if given.is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError:
        raise CannotStart("without a home folder, give it a folder with --files-dir") from None

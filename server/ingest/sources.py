"""Reads the bytes of media: from the body, the web (past the guard), a file or an upload."""

import os
import stat
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from server.concurrency import in_thread
from server.errors import ImageFetchFailed, ImageTooLarge, ImageUrlBlocked
from server.ingest.fetch import Fetcher
from server.ingest.files import FileReader, FileStore, files_disabled
from server.request import payloads
from server.request.budgets import Item
from server.request.context import RequestContext
from server.request.media import Inline, Remote, Single, Uploaded
from server.telemetry import metrics


class SourceReader:
    """Reads the files of media parts."""

    def __init__(
        self, fetcher: Fetcher, local_path: str | None, files: FileStore | FileReader | None
    ) -> None:
        """`local_path` is the folder that `file:` URLs may point into; None refuses them."""
        self._fetcher = fetcher
        self._local_path = Path(local_path).resolve() if local_path else None
        self._files = files

    @property
    def files(self) -> FileStore | FileReader:
        """The store of uploaded files.

        Raises:
            FilesDisabled: the server has none.
        """
        if self._files is None or (isinstance(self._files, FileReader) and not self._files.is_on):
            raise files_disabled()
        return self._files

    async def read(self, source: Single, context: RequestContext, most: int) -> bytes:
        """The file of `source`, for which the request holds memory from before it is loaded.

        Raises InvalidImageUrl, ImageUrlBlocked, ImageFetchFailed, ImageFetchTimeout,
        ImageTooLarge, UnknownFile, FilesDisabled, FileStorageFailed or MediaMemoryFull."""
        held = _Held(context, self._expected_bytes(source, context, most))
        with _Timed(context, source):
            await context.holdings.take(Item.FILES, held.nbytes)
            data = await self._read(source, context, most, held)
        held.become(len(data))
        return data

    async def listed(
        self, source: Single, context: RequestContext, most: int, most_pictures: int
    ) -> list[bytes] | None:
        """The pictures that are listed in the text of `source`, of at most `most` bytes together;
        None if it has no such list. Raises as `read` does, and TooManyImages."""
        if not isinstance(source, Inline):
            return None
        held = _Held(context, len(source.text))
        await context.holdings.take(Item.FILES, held.nbytes)
        found = await in_thread(payloads.pictures, source.text, most, most_pictures)
        held.become(sum(map(len, found or ())))
        return found

    def _expected_bytes(self, source: Single, context: RequestContext, most: int) -> int:
        """How large the file of `source` may be, in bytes."""
        if isinstance(source, Inline):
            return min(most, len(source.text))
        if isinstance(source, Uploaded):
            return min(most, self.files.get(context.group, source.file_id).size)
        return most

    async def _read(
        self, source: Single, context: RequestContext, most: int, held: "_Held"
    ) -> bytes:
        if isinstance(source, Inline):
            if payloads.is_small(source.text):
                return payloads.decode(source.text, most)
            return await in_thread(payloads.decode, source.text, most)
        if isinstance(source, Uploaded):
            read = self.files.read
            return await in_thread(read, context.group, source.file_id, most)
        if source.url[:5].lower() == "file:":
            return await in_thread(self._read_local, source.url, most)
        return await self._fetcher.fetch(source.url, context.group, most, held.become)

    def _read_local(self, url: str, max_bytes: int) -> bytes:
        """Read a local file. Errors do not reveal which files exist outside the allowed folder."""
        blocked = ImageUrlBlocked("the file is outside of --allowed-local-media-path")
        if self._local_path is None:
            raise blocked
        try:
            parts = urlsplit(url)
            path = Path(os.path.realpath(unquote(parts.path)))
        except ValueError:
            raise blocked from None
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(self._local_path):
            raise blocked
        try:
            # O_NONBLOCK: otherwise, opening a named pipe would wait for its writer.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ImageFetchFailed("the file could not be read")
                data = file.read(max_bytes + 1)
        except (OSError, ValueError):
            raise ImageFetchFailed("the file could not be read") from None
        if len(data) > max_bytes:
            raise ImageTooLarge(f"the image has more than {max_bytes} bytes, which is the limit")
        return data


class _Held:
    """The memory that a request holds for one file; its size becomes known while it is loaded."""

    def __init__(self, context: RequestContext, nbytes: int) -> None:
        self.nbytes = nbytes
        self._holdings = context.holdings

    def become(self, nbytes: int) -> None:
        """Hold `nbytes` from now on."""
        self._holdings.note(Item.FILES, nbytes - self.nbytes)
        self.nbytes = nbytes


class _Timed:
    """Records the duration of the load from `source`, also if it fails."""

    def __init__(self, context: RequestContext, source: object) -> None:
        self._kind = _kind_of(source)
        self._fetch = context.record.timeline.fetch(time.monotonic())

    def __enter__(self) -> None:
        """The load begins."""

    def __exit__(self, *_: object) -> None:
        fetch = self._fetch
        fetch.end = time.monotonic()
        metrics.image_fetch.labels(self._kind).observe(fetch.end - fetch.start)


def _kind_of(source: object) -> str:
    if isinstance(source, Inline):
        return "data"
    if isinstance(source, Uploaded):
        return "stored"
    return "file" if isinstance(source, Remote) and source.url[:5].lower() == "file:" else "http"

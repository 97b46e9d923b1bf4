"""From the URL of an image or a file to its bytes, whatever the URL's scheme."""

import asyncio
import contextlib
import contextvars
import functools
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from server.errors import (
    FilesDisabled,
    ImageFetchFailed,
    ImageTooLarge,
    ImageUrlBlocked,
    InvalidImageUrl,
    SaccadeError,
)
from server.imaging.encoded import EncodedImage, encoded
from server.imaging.limits import Limits
from server.ingest.fetch import Fetcher
from server.ingest.files import FileStore
from server.request import context as request
from server.request import payloads, tenant
from server.request.image_request import ImageRequest
from server.request.parts import STORED_SCHEME, split_options
from server.telemetry import metrics, record

T = TypeVar("T")

# Where a URL leads, by its scheme; else to the web.
_SOURCES = {"data": "data", "file": "file", STORED_SCHEME: "stored"}

# base64 and hashing let go of the GIL; more threads than this only wait for memory.
_threads = ThreadPoolExecutor(4, "image-load")


class ImageLoader:
    """Loads `data:`, `http(s):` and, below `local_path`, `file:` URLs, and uploaded files."""

    def __init__(
        self,
        fetcher: Fetcher,
        limits: Limits,
        local_path: str | None,
        files: FileStore | None = None,
    ) -> None:
        self._fetcher = fetcher
        self._limits = limits
        self._local_path = Path(local_path).resolve() if local_path else None
        self._files = files

    @property
    def files(self) -> FileStore:
        """The uploaded files.

        Raises:
            FilesDisabled: the server keeps none.
        """
        if self._files is None:
            raise FilesDisabled("this server keeps no files; it was started without --files-dir")
        return self._files

    async def image(self, name: str) -> EncodedImage:
        """The image at the URL `name`, which may have options before it, within the limits.

        Raises:
            ClientError: any of those about images, with `part` set to `name`.
        """
        url, options = split_options(name)
        if (image := _prepared(url)) is not None:
            return image
        try:
            with _fetching(url):
                if url[:5].lower() == "data:" and payloads.is_small(url):
                    data = payloads.load_data_url(url, self._limits.max_bytes)
                    image = encoded(data, self._limits)
                else:
                    data = await self._data(url, self._limits.max_bytes)
                    image = await in_thread(encoded, data, self._limits)
        except SaccadeError as error:
            error.part = name
            raise
        metrics.image_bytes.observe(len(image.data))
        metrics.image_pixels.observe(math.prod(image.size))
        return image.named(name, options)

    async def data(self, url: str, max_bytes: int | None = None) -> bytes:
        """The bytes at `url`, at most `max_bytes` or else as many as an image may have.

        Raises:
            InvalidImageUrl, ImageUrlBlocked, ImageFetchFailed, ImageFetchTimeout, ImageTooLarge
            UnknownFile, FilesDisabled, FileStorageFailed
        """
        with _fetching(url):
            return await self._data(url, max_bytes or self._limits.max_bytes)

    async def _data(self, url: str, max_bytes: int) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await in_thread(payloads.load_data_url, url, max_bytes)
        if scheme == "file":
            return await in_thread(self._read, url, max_bytes)
        if scheme == STORED_SCHEME:
            file_id = url.partition(":")[2]
            return await in_thread(self.files.read, tenant.group(), file_id, max_bytes)
        if scheme in ("http", "https"):
            return await self._fetcher.fetch(url, tenant.group(), max_bytes)
        raise InvalidImageUrl("the image URL must be a data, http, https or file URL")

    def _read(self, url: str, max_bytes: int) -> bytes:
        """Read a local file. What lies elsewhere and what does not exist are told apart by
        nobody who may not read it."""
        blocked = ImageUrlBlocked("the file is not below --allowed-local-media-path")
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
            # Not blocking: a named pipe would wait for its writer.
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


def _prepared(url: str) -> EncodedImage | None:
    context = request.current()
    return context.prepared.get(url) if isinstance(context, ImageRequest) else None


@contextlib.contextmanager
def _fetching(url: str) -> Iterator[None]:
    """Note how long it takes to load what is at `url`, also where that fails."""
    started = time.monotonic()
    fetch = record.current().timeline.fetch(started)
    try:
        yield
    finally:
        fetch.end = time.monotonic()
        source = _SOURCES.get(url.partition(":")[0].lower(), "http")
        metrics.image_fetch.labels(source).observe(fetch.end - started)


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run `work` in a thread, within the context of the request."""
    run = functools.partial(contextvars.copy_context().run, work, *args)
    return await asyncio.get_running_loop().run_in_executor(_threads, run)

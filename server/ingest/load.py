"""Loads the media of a request: their bytes, and the sizes in their headers.

    MediaRef -> bytes (body | web, past the guard | file | upload) -> hash, header, limits -> images

All parts of a request load concurrently. The first failure, or the end of the request, cancels the
others.
"""

import math
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from blake3 import blake3
from cachetools import LRUCache

from server.concurrency import all_or_none, in_thread
from server.errors import (
    AudioTooLarge,
    ImageFetchFailed,
    ImageTooLarge,
    ImageUrlBlocked,
    SaccadeError,
    TooManyImages,
    UnknownImage,
    VideoTooLarge,
)
from server.imaging.containers import holds_pictures
from server.imaging.encoded import EncodedImage, encoded
from server.imaging.video import header as headers
from server.imaging.video.header import VideoHeader
from server.ingest.expand import Expander, is_pdf
from server.ingest.fetch import Fetcher
from server.ingest.files import FileReader, FileStore, files_disabled
from server.request import payloads
from server.request.budgets import Item
from server.request.context import RequestContext
from server.request.media import Inline, MediaLimits, MediaRef, Remote, SentBefore, Uploaded
from server.telemetry import metrics

# Most images that clients may name by uuid without sending them again.
_REMEMBERED_NAMES = 100_000


class MediaLoader:
    """Loads the media of requests, within the limits."""

    def __init__(
        self,
        fetcher: Fetcher,
        limits: MediaLimits,
        local_path: str | None,
        files: FileStore | FileReader | None,
        expander: Expander,
    ) -> None:
        """`local_path` is the folder that `file:` URLs may point into; None refuses them."""
        self._fetcher = fetcher
        self._limits = limits
        self._local_path = Path(local_path).resolve() if local_path else None
        self._files = files
        self._expander = expander
        self._named = NamedImages()

    @property
    def limits(self) -> MediaLimits:
        return self._limits

    @property
    def files(self) -> FileStore | FileReader:
        """The store of uploaded files.

        Raises:
            FilesDisabled: the server has none.
        """
        if self._files is None or (isinstance(self._files, FileReader) and not self._files.is_on):
            raise files_disabled()
        return self._files

    async def load(self, context: RequestContext) -> None:
        """Set `images`, or `data` of a clip, on each media part of `context`.

        Raises:
            ClientError: a part cannot be loaded; `param` is the path of the part.
        """
        media = context.media
        self._check_uploads(context)
        await all_or_none([self._load(ref, context) for ref in media])
        self._check_count(media)

    async def check_upload(self, data: memoryview, context: RequestContext) -> None:
        """Check a file before it is stored, by the rules for images and PDFs.

        Raises:
            ClientError: a request with this file would be refused too.
        """
        await self._expander.check_upload(data, context.record)

    def _check_uploads(self, context: RequestContext) -> None:
        """Refuse unknown files before anything is fetched."""
        for ref in context.media:
            if isinstance(ref.source, Uploaded):
                try:
                    self.files.get(context.group, ref.source.file_id)
                except SaccadeError as error:
                    error.param = ref.path
                    raise

    def _check_count(self, media: list[MediaRef]) -> None:
        images, most = 0, self._limits.max_images
        for ref in media:
            images += len(ref.images)
            if images > most:
                raise TooManyImages(
                    f"the request has more than {most} images, which is the limit", param=ref.path
                )

    def _expected_bytes(self, ref: MediaRef, context: RequestContext, most: int) -> int:
        """How large the file of `ref` may be, in bytes."""
        source = ref.source
        if isinstance(source, Inline):
            return min(most, len(source.text))
        if isinstance(source, Uploaded):
            return min(most, self.files.get(context.group, source.file_id).size)
        return most

    async def _load(self, ref: MediaRef, context: RequestContext) -> None:
        try:
            if ref.kind in ("video", "audio"):
                if not isinstance(ref.source, SentBefore):
                    ref.data = await self._clip(ref, context)
                    ref.video = await self._header(ref)
            elif isinstance(ref.source, SentBefore):
                assert ref.uuid is not None
                image = self._named.get(context.group, ref.uuid)
                ref.images = [replace(image, options=ref.options, path=ref.path)]
            else:
                ref.images = await self._images(ref, context)
        except SaccadeError as error:
            error.param = error.param or ref.path
            raise
        ref.source = None  # frees the body, since payloads are views of it

    async def _images(self, ref: MediaRef, context: RequestContext) -> list[EncodedImage]:
        is_small = isinstance(ref.source, Inline) and payloads.is_small(ref.source.text)
        data = await self._bytes(ref, context, self._limits.image.max_bytes)
        metrics.image_bytes.observe(len(data))
        if is_pdf(data):
            images = await self._expander.pages(data, ref, context.record)
        else:
            limits = self._limits.image
            image = encoded(data, limits) if is_small else await in_thread(encoded, data, limits)
            images = await self._expander.frames(image, ref, context.record)
        for image in images:
            metrics.image_pixels.observe(math.prod(image.size))
        if ref.uuid is not None:
            self._named.put(context.group, ref.uuid, images)
        return images

    async def _clip(self, ref: MediaRef, context: RequestContext) -> bytes:
        """Raises as `_bytes` does, but VideoTooLarge or AudioTooLarge for ImageTooLarge."""
        most, source = self._limits.max_clip_bytes, ref.source
        try:
            if ref.kind == "video" and isinstance(source, Inline):
                await context.holdings.take(Item.FILES, len(source.text))
                found = await in_thread(payloads.pictures, source.text, most)
                if found is not None:
                    return found
                context.holdings.note(Item.FILES, -len(source.text))
            return await self._bytes(ref, context, most)
        except ImageTooLarge:
            limit = f"has more than {most} bytes, which is the limit"
            if ref.kind == "video":
                raise VideoTooLarge(f"the video {limit}") from None
            raise AudioTooLarge(f"the audio clip {limit}") from None

    async def _header(self, ref: MediaRef) -> VideoHeader | None:
        """What the header of a video says; None for an audio clip, and for pictures.

        Raises:
            UnsupportedVideoFormat, InvalidVideo, VideoTooLarge
        """
        if ref.kind != "video" or holds_pictures(ref.data):
            return None
        header = await in_thread(headers.read, ref.data)
        self._limits.video.check(header)
        return header

    async def _bytes(self, ref: MediaRef, context: RequestContext, most: int) -> bytes:
        """The file of `ref`, for which the request holds memory from before it is loaded.

        Raises InvalidImageUrl, ImageUrlBlocked, ImageFetchFailed, ImageFetchTimeout,
        ImageTooLarge, UnknownFile, FilesDisabled, FileStorageFailed or MediaMemoryFull."""
        held = _Held(context, self._expected_bytes(ref, context, most))
        with _Timed(context, ref.source):
            await context.holdings.take(Item.FILES, held.nbytes)
            data = await self._read_source(ref, context, most, held)
        held.become(len(data))
        return data

    async def _read_source(
        self, ref: MediaRef, context: RequestContext, most: int, held: "_Held"
    ) -> bytes:
        source = ref.source
        if isinstance(source, Inline):
            if payloads.is_small(source.text):
                return payloads.decode(source.text, most)
            return await in_thread(payloads.decode, source.text, most)
        if isinstance(source, Uploaded):
            read = self.files.read
            return await in_thread(read, context.group, source.file_id, most)
        assert isinstance(source, Remote)
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


class NamedImages:
    """The images that were sent under a uuid, without their bytes.

    A uuid names bytes that the same group has sent; it is never used as the key of a cache.
    """

    def __init__(self) -> None:
        # By the hash of group and uuid: uuids may be long.
        self._images: LRUCache[bytes, EncodedImage] = LRUCache(_REMEMBERED_NAMES)

    def put(self, group: str, uuid: str, images: Sequence[EncodedImage]) -> None:
        """Remember the image that `uuid` names, unless it names several."""
        if len(images) == 1:
            self._images[_key(group, uuid)] = replace(images[0], data=b"", path="")

    def get(self, group: str, uuid: str) -> EncodedImage:
        """Raises UnknownImage if `group` has sent nothing under `uuid`."""
        image = self._images.get(_key(group, uuid))
        if image is None:
            raise UnknownImage("the part has no image data, and its uuid is unknown")
        return image


def _key(group: str, uuid: str) -> bytes:
    return blake3(f"{group}\n{uuid}".encode()).digest()

"""Loads the media of a request: their bytes, and the sizes in their headers.

    MediaRef -> bytes (body | web, past the guard | file | upload) -> hash, header, limits -> images

All parts of a request load concurrently. The first failure, or the end of the request, cancels the
others.
"""

import asyncio
import math
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from cachetools import LRUCache
from msgspec import structs

from server.concurrency import all_or_none, copied, in_thread
from server.errors import (
    AudioTooLarge,
    ClientError,
    ImageFetchFailed,
    ImageTooLarge,
    ImageUrlBlocked,
    InvalidFile,
    SaccadeError,
    TooManyImages,
    UnknownImage,
    VideoTooLarge,
)
from server.imaging.encoded import EncodedImage, encoded
from server.imaging.sampling import SamplingOptions
from server.ingest.expand import Expander, is_pdf
from server.ingest.fetch import Fetcher
from server.ingest.files import FileReader, FileStore, files_disabled
from server.ingest.videos import LoadedVideo, NamedVideos, is_video, key_of, of_file, of_pictures
from server.request import payloads
from server.request.budgets import Item
from server.request.context import RequestContext
from server.request.media import (
    Inline,
    MediaLimits,
    MediaRef,
    Pictures,
    Remote,
    SentBefore,
    Single,
    Source,
    Uploaded,
)
from server.telemetry import metrics

# Most images that clients may name by uuid without sending them again.
_REMEMBERED_NAMES = 100_000
# Pictures of one video that are loaded at the same time.
_PICTURES_AT_ONCE = 8
# As many bytes as identify the format of a file.
_MAGIC_BYTES = 64


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
        self._named_videos = NamedVideos()

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
        """Check a file before it is stored, by the rules for images, PDFs and videos.

        Raises:
            ClientError: a request with this file would be refused too.
        """
        if not is_video(bytes(data[:_MAGIC_BYTES])):
            await self._expander.check_upload(data, context.record)
            return
        most = self._limits.max_clip_bytes
        if not self._limits.max_clips.get("video"):
            raise ClientError("this model takes no video input")
        if len(data) > most:
            raise _too_large("video", most)
        await in_thread(of_file, await in_thread(copied, data), self._limits.video)

    def _check_uploads(self, context: RequestContext) -> None:
        """Refuse unknown files before anything is fetched."""
        for ref in context.media:
            for uploaded in uploads(ref.source):
                try:
                    self.files.get(context.group, uploaded.file_id)
                except SaccadeError as error:
                    error.param = ref.path
                    raise

    def _check_count(self, media: list[MediaRef]) -> None:
        images, most = 0, self._limits.max_images
        videos, most_videos = 0, self._limits.max_clips.get("video", 0)
        for ref in media:
            images += len(ref.images)
            videos += ref.kind == "video"
            if videos > most_videos:
                raise TooManyImages(
                    f"the request has more than {most_videos} video parts, which is the limit",
                    param=ref.path,
                )
            if images > most:
                raise TooManyImages(
                    f"the request has more than {most} images, which is the limit", param=ref.path
                )

    def _expected_bytes(self, source: Single, context: RequestContext, most: int) -> int:
        """How large the file of `source` may be, in bytes."""
        if isinstance(source, Inline):
            return min(most, len(source.text))
        if isinstance(source, Uploaded):
            return min(most, self.files.get(context.group, source.file_id).size)
        return most

    async def _load(self, ref: MediaRef, context: RequestContext) -> None:
        try:
            if ref.kind == "video":
                await self._video(ref, context)
            elif ref.kind == "audio":
                if not isinstance(ref.source, SentBefore):
                    ref.data = await self._audio(ref, context)
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
        """The images of a part; none if its file turns out to be a video."""
        source = single(ref)
        is_small = isinstance(source, Inline) and payloads.is_small(source.text)
        data = await self._bytes(source, context, self._most_bytes(ref))
        if ref.kind == "file" and is_video(data):
            await self._found_video(ref, data, context)
            return []
        if structs.replace(ref.sampling, max_tokens=None) != SamplingOptions():
            raise InvalidFile("the file is no video, and has options of one")
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

    def _most_bytes(self, ref: MediaRef) -> int:
        """How large the file of an image or a file part may be. An uploaded file, and one in the
        body, may be a video."""
        limits = self._limits
        if ref.kind == "file" and not isinstance(ref.source, Remote):
            return max(limits.image.max_bytes, limits.max_clip_bytes)
        return limits.image.max_bytes

    async def _found_video(self, ref: MediaRef, data: bytes, context: RequestContext) -> None:
        """Let a file part be the video that its file is."""
        if ref.frames is not None:
            raise InvalidFile("the file is a video and has no pages")
        ref.kind = "video"
        if not self._limits.max_clips.get("video"):
            raise ClientError("this model takes no video input")
        if len(data) > self._limits.max_clip_bytes:
            raise _too_large("video", self._limits.max_clip_bytes)
        self._place(ref, await in_thread(of_file, data, self._limits.video), context)

    async def _video(self, ref: MediaRef, context: RequestContext) -> None:
        """Load a video. Raises as `_bytes` does, but VideoTooLarge for ImageTooLarge, and
        UnsupportedVideoFormat, InvalidVideo or UnknownImage."""
        source, limits = ref.source, self._limits
        if isinstance(source, SentBefore):
            assert ref.uuid is not None
            self._place(ref, self._named_videos.get(context.group, ref.uuid), context)
            return
        try:
            if isinstance(source, Pictures):
                pictures = await self._pictures(source.frames, context)
            elif (listed := await self._listed(single(ref), context)) is not None:
                pictures = listed
            else:
                pictures = [await self._bytes(single(ref), context, limits.max_clip_bytes)]
        except ImageTooLarge:
            raise _too_large("video", limits.max_clip_bytes) from None
        if len(pictures) == 1 and not isinstance(source, Pictures):
            loaded = await in_thread(of_file, pictures[0], limits.video)
        else:
            loaded = await in_thread(of_pictures, pictures, limits.video)
        self._place(ref, loaded, context)

    def _place(self, ref: MediaRef, video: LoadedVideo, context: RequestContext) -> None:
        ref.data, ref.digest, ref.video = video.data, video.digest, video.header
        if ref.uuid is not None and video.data:
            self._named_videos.put(context.group, ref.uuid, video)

    async def _listed(self, source: Single, context: RequestContext) -> list[bytes] | None:
        """The pictures that are listed in the text of `source`; None if it has no such list."""
        if not isinstance(source, Inline):
            return None
        held = _Held(context, len(source.text))
        await context.holdings.take(Item.FILES, held.nbytes)
        found = await in_thread(payloads.pictures, source.text, self._limits.max_clip_bytes)
        held.become(sum(map(len, found or ())))
        return found

    async def _pictures(self, frames: Sequence[Single], context: RequestContext) -> list[bytes]:
        """The files of a video's pictures, which are loaded some at a time."""
        most, at_once = self._limits.max_clip_bytes, asyncio.Semaphore(_PICTURES_AT_ONCE)
        loaded = 0

        async def load(source: Single) -> bytes:
            nonlocal loaded
            async with at_once:
                data = await self._bytes(source, context, self._limits.image.max_bytes)
            loaded += len(data)
            if loaded > most:
                raise _too_large("video", most)
            return data

        return await all_or_none([load(source) for source in frames])

    async def _audio(self, ref: MediaRef, context: RequestContext) -> bytes:
        """Raises as `_bytes` does, but AudioTooLarge for ImageTooLarge."""
        most = self._limits.max_clip_bytes
        try:
            return await self._bytes(single(ref), context, most)
        except ImageTooLarge:
            raise _too_large("audio clip", most) from None

    async def _bytes(self, source: Single, context: RequestContext, most: int) -> bytes:
        """The file of `source`, for which the request holds memory from before it is loaded.

        Raises InvalidImageUrl, ImageUrlBlocked, ImageFetchFailed, ImageFetchTimeout,
        ImageTooLarge, UnknownFile, FilesDisabled, FileStorageFailed or MediaMemoryFull."""
        held = _Held(context, self._expected_bytes(source, context, most))
        with _Timed(context, source):
            await context.holdings.take(Item.FILES, held.nbytes)
            data = await self._read_source(source, context, most, held)
        held.become(len(data))
        return data

    async def _read_source(
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


def single(ref: MediaRef) -> Single:
    """The source of a part that has one file."""
    assert isinstance(ref.source, Single)
    return ref.source


def uploads(source: Source | None) -> list[Uploaded]:
    """The uploaded files of a part."""
    frames = source.frames if isinstance(source, Pictures) else (source,)
    return [each for each in frames if isinstance(each, Uploaded)]


def _too_large(kind: Literal["video", "audio clip"], most: int) -> ClientError:
    error = VideoTooLarge if kind == "video" else AudioTooLarge
    return error(f"the {kind} has more than {most} bytes, which is the limit")


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
            self._images[key_of(group, uuid)] = replace(images[0], data=b"", path="")

    def get(self, group: str, uuid: str) -> EncodedImage:
        """Raises UnknownImage if `group` has sent nothing under `uuid`."""
        image = self._images.get(key_of(group, uuid))
        if image is None:
            raise UnknownImage("the part has no image data, and its uuid is unknown")
        return image

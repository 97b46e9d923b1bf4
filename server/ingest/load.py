"""Loads the media of a request: their bytes, and the sizes in their headers.

    MediaRef -> bytes (body | web, past the guard | file | upload) -> hash, header, limits -> images

All parts of a request load concurrently. The first failure, or the end of the request, cancels the
others.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from msgspec import structs

from server.concurrency import all_or_none, copied, in_thread
from server.errors import (
    AudioTooLarge,
    ClientError,
    ImageTooLarge,
    InvalidFile,
    SaccadeError,
    TooManyImages,
    VideoTooLarge,
)
from server.imaging.encoded import EncodedImage, encoded
from server.imaging.sampling import SamplingOptions
from server.ingest.expand import Expander, is_pdf
from server.ingest.fetch import Fetcher
from server.ingest.files import FileReader, FileStore
from server.ingest.named import NamedImages, NamedVideos
from server.ingest.reduce import Reducer
from server.ingest.sources import SourceReader
from server.ingest.videos import LoadedVideo, is_video, of_file, of_pictures
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
        reducer: Reducer | None = None,
    ) -> None:
        """`local_path` is the folder that `file:` URLs may point into; None refuses them. Without a
        `reducer`, all pictures are whole."""
        self._sources = SourceReader(fetcher, local_path, files)
        self._limits = limits
        self._expander = expander
        self._reducer = reducer
        self._named = NamedImages()
        self._named_videos = NamedVideos()

    @property
    def limits(self) -> MediaLimits:
        return self._limits

    async def load(self, context: RequestContext) -> None:
        """Set `images`, or `data` of a clip, on each media part of `context`.

        Raises:
            ClientError: a part cannot be loaded; `param` is the path of the part.
        """
        media = context.media
        self._check_uploads(context)
        await all_or_none([self._load(ref, context) for ref in media])
        self._check_count(media)
        # Only now is it known that the request may have so many pages and frames to look at.
        images = sum(len(ref.images) for ref in media)
        looked_at = [ref for ref in media if self._is_looked_at(ref)]
        if looked_at:
            await all_or_none([self._look(ref, context, images) for ref in looked_at])

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
                    self._sources.files.get(context.group, uploaded.file_id)
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

    def _is_looked_at(self, ref: MediaRef) -> bool:
        if ref.include_text and ref.images:
            return True
        return self._reducer is not None and any(map(self._reducer.reduces, ref.images))

    async def _look(self, ref: MediaRef, context: RequestContext, images: int) -> None:
        """Read the text of a PDF's pages, and reduce the images of `ref`, where that is asked for.
        The request has so many `images`."""
        try:
            if ref.include_text:
                ref.texts = await self._expander.texts(ref.images, context.record)
            if self._reducer is not None:
                has_video = any(each.kind == "video" for each in context.media)
                # What crops would get of a budget beside a video is not known here.
                has_no_crops = has_video and context.max_image_tokens is not None
                room = 1 if has_no_crops else self._limits.max_images // images
                ref.images = await self._reducer.reduce(ref.images, context, room, images)
        except SaccadeError as error:
            error.param = error.param or ref.path
            raise

    async def _images(self, ref: MediaRef, context: RequestContext) -> list[EncodedImage]:
        """The images of a part; none if its file turns out to be a video."""
        source = single(ref)
        is_small = isinstance(source, Inline) and payloads.is_small(source.text)
        data = await self._sources.read(source, context, self._most_bytes(ref))
        if ref.kind == "file" and is_video(data):
            await self._found_video(ref, data, context)
            return []
        if structs.replace(ref.sampling, max_tokens=None) != SamplingOptions():
            raise InvalidFile("the file is no video, and has options of one")
        metrics.image_bytes.observe(len(data))
        if is_pdf(data):
            images = await self._expander.pages(data, ref, context.record)
        elif ref.include_text:
            raise InvalidFile("the file is an image and has no text layer")
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
        if ref.frames is not None or ref.include_text:
            raise InvalidFile("the file is a video and has no pages")
        ref.kind = "video"
        if not self._limits.max_clips.get("video"):
            raise ClientError("this model takes no video input")
        if len(data) > self._limits.max_clip_bytes:
            raise _too_large("video", self._limits.max_clip_bytes)
        self._place(ref, await in_thread(of_file, data, self._limits.video), context)

    async def _video(self, ref: MediaRef, context: RequestContext) -> None:
        """Load a video. Raises as `SourceReader.read` does, but VideoTooLarge for ImageTooLarge,
        and UnsupportedVideoFormat, InvalidVideo or UnknownImage."""
        source, limits, most = ref.source, self._limits.video, self._limits.max_clip_bytes
        if isinstance(source, SentBefore):
            assert ref.uuid is not None
            self._place(ref, self._named_videos.get(context.group, ref.uuid), context)
            return
        try:
            if isinstance(source, Pictures):
                pictures = await self._pictures(source.frames, context)
            else:
                pictures = await self._listed_or_file(single(ref), context)
        except ImageTooLarge:
            raise _too_large("video", most) from None
        if len(pictures) == 1 and not isinstance(source, Pictures):
            loaded = await in_thread(of_file, pictures[0], limits)
        else:
            loaded = await self._packed(pictures, context)
        self._place(ref, loaded, context)

    async def _listed_or_file(self, source: Single, context: RequestContext) -> list[bytes]:
        """The pictures that are listed in the text of `source`; or else its file alone."""
        most, pictures = self._limits.max_clip_bytes, self._limits.max_shown_frames
        listed = await self._sources.listed(source, context, most, pictures)
        return [await self._sources.read(source, context, most)] if listed is None else listed

    async def _packed(self, pictures: list[bytes], context: RequestContext) -> LoadedVideo:
        """The video of these pictures, which are in memory twice for a moment."""
        nbytes = sum(map(len, pictures))
        await context.holdings.take(Item.FILES, nbytes)
        try:
            return await in_thread(of_pictures, pictures, self._limits.video)
        finally:
            context.holdings.note(Item.FILES, -nbytes)

    def _place(self, ref: MediaRef, video: LoadedVideo, context: RequestContext) -> None:
        ref.data, ref.digest, ref.video = video.data, video.digest, video.header
        if ref.uuid is not None and video.data:
            self._named_videos.put(context.group, ref.uuid, video)

    async def _pictures(self, frames: Sequence[Single], context: RequestContext) -> list[bytes]:
        """The files of a video's pictures, which are loaded some at a time."""
        most, at_once = self._limits.max_clip_bytes, asyncio.Semaphore(_PICTURES_AT_ONCE)
        loaded = 0

        async def load(source: Single) -> bytes:
            nonlocal loaded
            async with at_once:
                data = await self._sources.read(source, context, self._limits.image.max_bytes)
            loaded += len(data)
            if loaded > most:
                raise _too_large("video", most)
            return data

        return await all_or_none([load(source) for source in frames])

    async def _audio(self, ref: MediaRef, context: RequestContext) -> bytes:
        """Raises as `SourceReader.read` does, but AudioTooLarge for ImageTooLarge."""
        most = self._limits.max_clip_bytes
        try:
            return await self._sources.read(single(ref), context, most)
        except ImageTooLarge:
            raise _too_large("audio clip", most) from None


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

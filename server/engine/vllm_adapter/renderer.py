"""From tokens and images to what the engine takes, with the image work handed to the worker pool.

What vLLM does in one thread for a whole prompt is done here image by image:

    key = hash(bytes, options, model)  ->  known to the engine?  nothing else to do
                                       ->  else pool.process(bytes)  ->  features
    prompt + features -> placeholders expanded -> engine input

Videos take the same way, with a child process for each instead of the pool.

Models whose processor looks at the prompt as a whole (`levels.images_apart`) get decoded pictures
from the pool, and keep vLLM's own preprocessing.
"""

import asyncio
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from blake3 import blake3
from PIL import Image
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.renderers.base import BaseRenderer

from server.concurrency import all_or_none
from server.engine.token_allocator import TokenAllocator, shown_image
from server.engine.video_allocator import VideoAllocator
from server.engine.vllm_adapter import levels, processors
from server.engine.vllm_adapter.conversation import ConversationRenderer
from server.engine.vllm_adapter.items import ItemMaker
from server.engine.vllm_adapter.merging import merged
from server.engine.vllm_adapter.processor_cache import PooledItem, ProcessorCache, copied
from server.engine.vllm_adapter.processors import (
    PlaceholdersMissing,
    ProcessorFailed,
    Updates,
    translated_errors,
)
from server.engine.vllm_adapter.video_jobs import VideoJob, video_item, video_job
from server.errors import ClientError, ImageTokenCap, SaccadeError, UnknownImage
from server.imaging.encoded import EncodedImage
from server.imaging.tokens import TokenAllocation
from server.imaging.video.encoded import EncodedVideo
from server.ingest.video_features import VideoExtractor
from server.request import context as requests
from server.request.budgets import Item
from server.request.context import RequestContext, ShownImage
from server.request.groups import prefixed
from server.settings import Settings
from server.telemetry import metrics
from server.workers.jobs import DecodeIO, PixelsJob, ProcessJob, encode_job, encode_kwargs
from server.workers.pool import ImagePool
from server.workers.protocol import Features

log = logging.getLogger("saccade.engine")

# Three channels of 32 bits, in what most processors return.
_MOST_BYTES_PER_PIXEL = 12

_HITS, _MISSES = (metrics.image_lookups.labels(result) for result in ("hit", "miss"))

Announce = Callable[[Sequence[tuple[str, int]]], None]
"""Takes the key and the tokens of each image of a prompt. Returns at once."""


class ImageJob(msgspec.Struct, frozen=True):
    """One image of a request: its tokens, the worker's job, the key of its features, and the
    keyword arguments of the model's processor."""

    context: RequestContext
    image: EncodedImage
    allocation: TokenAllocation | None
    key: str
    work: ProcessJob
    kwargs: Mapping[str, Any]


class MediaRenderer(BaseRenderer[Any]):
    """To be put before a renderer of vLLM's. Without `attach` it is that renderer, with the cache
    order settled at sending. `announce`, if set, is told of images before they are processed.

    Attributes:
        image_io: what this renderer of vLLM's has as defaults for `media_io_kwargs["image"]`.
    """

    image_io: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        if self._mm_processor_cache is not None:
            self._mm_processor_cache = ProcessorCache(self._mm_processor_cache)
        self._pool: ImagePool | None = None
        self._pooled = False
        self._modality: levels.Modality = "image"
        self._apart: int | None = None
        self._items: ItemMaker | None = None
        self.allocator: Any = None
        self._fingerprint = b""
        self.announce: Announce | None = None
        self._videos: VideoExtractor | None = None
        self.video_allocator: Any = None
        self._vllm_process_multimodal = self._process_multimodal_async
        self._process_multimodal_async = self._process_media

    def forget_features(self) -> None:
        """Forget the features that are kept here, for requests that only count tokens."""
        if self._mm_processor_only_cache is not None:
            self._mm_processor_only_cache.clear_cache()

    @property
    def processor_cache(self) -> ProcessorCache | None:
        cache = self._mm_processor_cache
        return cache if isinstance(cache, ProcessorCache) else None

    def attach(
        self, settings: Settings, pool: ImagePool, allocator: TokenAllocator, *, pooled: bool
    ) -> None:
        """Take encoded images. `pooled`: `pool` makes features of them; else it only decodes, for
        vLLM's own processor."""
        self._pool = pool
        self._pooled = pooled
        processor = self.get_mm_processor()
        self._modality = levels.modality_of(processor)
        self._apart = levels.images_apart(type(processor))
        self._items = ItemMaker(processor) if pooled else None
        self.allocator = allocator
        model = self.model_config
        parts = (
            "features-3",
            vllm_version,
            str(model.dtype),
            settings.images.image_decode,
            model.get_multimodal_config().mm_processor_kwargs,
        )
        self._fingerprint = json.dumps(parts, sort_keys=True, default=str).encode()

    def attach_videos(self, videos: VideoExtractor, allocator: VideoAllocator) -> None:
        """Take encoded videos too, of which `videos` makes features. Call `attach` before."""
        self._videos = videos
        self.video_allocator = allocator

    def detach_videos(self) -> None:
        """Leave videos to vLLM's own processor."""
        self._videos = None

    def both_ways_of_video(
        self, prompt: list[int], frames: Any, metadata: Mapping[str, Any]
    ) -> tuple[MultiModalInput, MultiModalInput]:
        """As `both_ways`, of a prompt with one video, uint8 (frames, height, width, 3). It is
        processed here and not in a child process."""
        processor = self.get_mm_processor()
        outputs, _ = processors.video_processed(processor, frames, metadata, {})
        height, width = frames.shape[1:3]
        blank = processors.blank_frames(len(frames), (width, height))
        item = processors.video_item(processor, outputs, blank, metadata, {})
        ours = merged(processor, prompt, {"video": ["test"]}, {"video": [item]})
        decoded = [(frames, dict(metadata))]
        return ours, self._process_multimodal(prompt, {"video": decoded}, None, None)

    async def both_ways(
        self, prompt: list[int], image: EncodedImage, picture: Image.Image
    ) -> tuple[MultiModalInput, MultiModalInput]:
        """What the engine gets of `prompt` with one image: as it is made here, and as vLLM makes it
        of the same image when it is decoded."""
        modality, processor = self._modality, self.get_mm_processor()
        theirs = prompt
        if levels.is_placed_by_tokenizer(type(processor)):
            prompt = processors.standing_for_a_picture(processor)
            theirs = processors.placeholder_of(processor, picture.size)
        ours = await self._process_images(
            prompt, {modality: [levels.as_item(modality, image)]}, None, None
        )
        decoded: dict[str, Any] = {modality: [levels.as_item(modality, picture)]}
        return ours, self._process_multimodal(theirs, decoded, None, None)

    # ------------------------------------------------------------------ one prompt

    async def _process_media(self, *args: Any, **options: Any) -> MultiModalInput:
        """Called by vLLM, with the arguments of `_process_images`.

        Raises:
            ClientError: the chat template or the model's processor refuses the media.
        """
        try:
            with translated_errors():
                return await self._process_images(*args, **options)
        except PlaceholdersMissing:
            raise _dropped(requests.current()) from None
        except ProcessorFailed:
            raise _unprocessable(requests.current()) from None

    async def _process_images(
        self,
        prompt: list[int],
        mm_data: Any,
        mm_uuids: Any,
        mm_processor_kwargs: Mapping[str, object] | None,
        media_io_kwargs: Mapping[str, Mapping[str, object]] | None = None,
        *,
        skip_mm_cache: bool = False,
    ) -> MultiModalInput:
        if _are(mm_data.get("video"), EncodedVideo) and self._videos is not None:
            return await self._process_videos(
                prompt, mm_data, mm_processor_kwargs, media_io_kwargs, skip_mm_cache=skip_mm_cache
            )
        modality = self._modality
        # A list, or a tensor of embeddings.
        images = levels.pictures_of(modality, mm_data.get(modality))
        if self._pool is None or not _are(images, EncodedImage):
            return await self._vllm_process_multimodal(
                prompt, mm_data, mm_uuids, mm_processor_kwargs, media_io_kwargs,
                skip_mm_cache=skip_mm_cache,
            )  # fmt: skip
        context = requests.current()
        kwargs = dict(mm_processor_kwargs or {})
        encode_kwargs(kwargs)  # refuses what is not JSON, before the allocator reads it
        io = self._decode_io(media_io_kwargs)
        allocations = await self.allocator.allocate(images, context.max_image_tokens, kwargs)
        tokens = sum(allocation.tokens for allocation in allocations if allocation is not None)
        if self._pooled and not skip_mm_cache:
            self._check_length(tokens)
        await context.holdings.take(Item.IMAGE_TOKENS, tokens)
        crowded = self._apart is not None and len(images) > max(self._apart, 1)
        pooled = self._pooled and set(mm_data) == {modality} and not crowded
        if not pooled:
            kwargs = _common_options(images, allocations, kwargs)
        jobs = [
            self._job(context, *pair, kwargs, io, crowded=crowded)
            for pair in zip(images, allocations, strict=True)
        ]
        if pooled:
            rendered, cached = await self._render(prompt, jobs, skip_mm_cache=skip_mm_cache)
        else:
            cached = [False] * len(jobs)
            rendered = await self._vllm_process_multimodal(
                prompt,
                {**mm_data, modality: await all_or_none(map(self._decode_image, jobs))},
                {**(mm_uuids or {}), modality: [job.key for job in jobs]},
                kwargs or None,
                media_io_kwargs,
                skip_mm_cache=skip_mm_cache,
            )
        placeholders = _placeholders(rendered, modality)
        if len(placeholders) == len(jobs):
            capped = self.allocator.limited(images, context.max_image_tokens)
            context.shown = self._shown(jobs, placeholders, cached, capped=capped)
            self._measure(jobs, context, kwargs)
        return rendered

    async def _render(
        self, prompt: list[int], jobs: Sequence[ImageJob], *, skip_mm_cache: bool
    ) -> tuple[MultiModalInput, list[bool]]:
        """What vLLM's processor would make of `prompt` and the images of `jobs`; and for which of
        them the engine holds the features already."""
        if self.announce is not None and not skip_mm_cache:
            self.announce([(job.key, job.allocation.tokens) for job in jobs if job.allocation])
        process = self._process_here if skip_mm_cache else self._process_image
        items = await all_or_none(map(process, jobs))
        keys = [job.key for job in jobs]
        kind = self._modality
        rendered = merged(self.get_mm_processor(), prompt, {kind: keys}, {kind: items})
        self.update_mm_cache_stats()
        return rendered, [not item and not skip_mm_cache for item, _ in items]

    async def _process_videos(
        self,
        prompt: list[int],
        mm_data: Any,
        mm_processor_kwargs: Mapping[str, object] | None,
        media_io_kwargs: Mapping[str, Mapping[str, object]] | None,
        *,
        skip_mm_cache: bool,
    ) -> MultiModalInput:
        """The same of a prompt with videos, and perhaps images beside them."""
        context = requests.current()
        images, videos = mm_data.get("image") or [], mm_data["video"]
        kwargs = dict(mm_processor_kwargs or {})
        encode_kwargs(kwargs)
        io = self._decode_io(media_io_kwargs)
        assert self._videos is not None
        sized = [(image.size, image.options) for image in images]
        paths = [each.path for each in (*images, *videos)]
        given = await self.video_allocator.allocate(
            sized, videos, paths, context.max_image_tokens, kwargs
        )
        tokens = sum(each.tokens for each in (*given[0], *given[1]) if each is not None)
        if not skip_mm_cache:
            self._check_length(tokens)
        await context.holdings.take(Item.IMAGE_TOKENS, tokens)
        most = self._videos.max_pixels
        jobs: list[ImageJob | VideoJob] = [
            self._job(context, *pair, kwargs, io) for pair in zip(images, given[0], strict=True)
        ]
        jobs += [
            video_job(context, *pair, kwargs, self._fingerprint, most, io.background)
            for pair in zip(videos, given[1], strict=True)
        ]
        if self.announce is not None and not skip_mm_cache:
            self.announce([(job.key, job.allocation.tokens) for job in jobs if job.allocation])
        process = self._process_here if skip_mm_cache else self._process_image
        items = await all_or_none(map(process, jobs))
        split = len(images)
        keys = [job.key for job in jobs]
        media = {"image": items[:split], "video": items[split:]}
        by_kind = {"image": keys[:split], "video": keys[split:]}
        if not images:
            del media["image"], by_kind["image"]
        rendered = merged(self.get_mm_processor(), prompt, by_kind, media)
        self.update_mm_cache_stats()
        cached = [not item and not skip_mm_cache for item, _ in items]
        self._show(context, jobs, rendered, cached, kwargs)
        return rendered

    def _check_length(self, tokens: int) -> None:
        """Refuse media that cannot fit into a prompt, before they are decoded.

        Raises:
            ClientError: they take more `tokens` than a prompt may have.
        """
        most = self.model_config.max_model_len
        if tokens > most:
            raise ClientError(
                f"the images and videos take {tokens} tokens, and the model takes {most} in all; "
                "send fewer of them, or set max_image_tokens",
                param=requests.current().media[0].path,
            )

    def _show(
        self,
        context: RequestContext,
        jobs: Sequence[ImageJob | VideoJob],
        rendered: Any,
        cached: Sequence[bool],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Note what the prompt holds of each image and video."""
        images = [job for job in jobs if isinstance(job, ImageJob)]
        videos = [job for job in jobs if isinstance(job, VideoJob)]
        if images:
            pictures = [job.image for job in images]
            capped = self.allocator.limited(pictures, context.max_image_tokens)
            places = _placeholders(rendered, "image")
            context.shown = self._shown(images, places, cached[: len(images)], capped=capped)
            self._measure(images, context, kwargs)
        capped = self.video_allocator.limited(
            [job.video for job in videos], context.max_image_tokens
        )
        context.shown_videos = []
        for job, place, was_cached in zip(
            videos, _placeholders(rendered, "video"), cached[len(images) :], strict=True
        ):
            tokens = place.get_num_embeds()
            if job.allocation is not None and tokens != job.allocation.tokens:
                log.error("a video has %d tokens instead of %d", tokens, job.allocation.tokens)
                if capped and tokens > job.allocation.tokens:
                    raise ImageTokenCap("the model takes more tokens", param=job.video.path)
            context.shown_videos.append(job.shown(tokens, cached=was_cached))
            metrics.video_tokens.observe(tokens)
            metrics.video_frames.observe(len(job.chosen.indices))

    def _job(
        self,
        context: RequestContext,
        image: EncodedImage,
        allocation: TokenAllocation | None,
        kwargs: Mapping[str, Any],
        io: DecodeIO,
        *,
        crowded: bool = False,
    ) -> ImageJob:
        """What a worker has to do for `image`. Its key is the hash of the image's bytes, of what
        is done with them, and of the model, prefixed with the group of the request. `crowded`: the
        model treats it in another way, since it is one of many."""
        kwargs = {**kwargs, **(allocation.options if allocation else {})}
        try:
            work = ProcessJob(
                format=image.header.format,
                size=image.header.size,
                frame=image.options.frame,
                resize=allocation.resize if allocation else None,
                io=io,
                crop=image.options.crop.box if image.options.crop is not None else None,
                kwargs=encode_kwargs(kwargs),
            )
        except ClientError as error:
            error.param = image.path
            raise
        hasher = blake3(self._fingerprint)
        hasher.update(encode_job(work))
        hasher.update(image.digest.encode())
        hasher.update(b"crowded" * crowded)
        key = prefixed(hasher.hexdigest(), context.group)
        return ImageJob(context, image, allocation, key, work, kwargs)

    async def _process_image(
        self, job: "ImageJob | VideoJob"
    ) -> tuple[MultiModalKwargsItem, Updates]:
        cache = self.processor_cache
        item = PooledItem()
        if (job.video if isinstance(job, VideoJob) else job.image).data:
            item.refill = functools.partial(self._features_of, job)
        if cache is not None and (known := cache.updates(job.key)) is not None:
            _HITS.inc()
            return item, known
        _MISSES.inc()
        features, updates = await self._process(job)
        item.take(features)
        if cache is not None:
            cache.remember(job.key, updates)
        return item, updates

    async def _process_here(
        self, job: "ImageJob | VideoJob"
    ) -> tuple[MultiModalKwargsItem, Updates]:
        """For requests that only count tokens: the features stay here."""
        cache = self._mm_processor_only_cache
        if cache is not None and cache.is_cached_item(job.key):
            item, updates = cache.get_and_update_item(None, job.key)
            return item, updates  # type: ignore[return-value]
        item, updates = await self._process(job)
        if cache is not None:
            kept = await asyncio.to_thread(copied, item)  # the copy grows with the image
            cache.get_and_update_item((kept, updates), job.key)
        return item, updates

    async def _features_of(self, job: "ImageJob | VideoJob") -> PooledItem:
        item, _ = await self._process(job)
        return item

    async def _process(self, job: "ImageJob | VideoJob") -> tuple[PooledItem, Updates]:
        if isinstance(job, VideoJob):
            return video_item(self.get_mm_processor(), await self._features_of_video(job), job)
        features = await self._in_pool(job.key, job, job.work)
        assert self._items is not None
        return self._items.item(features, job.kwargs, job.work.kwargs)

    async def _features_of_video(self, job: VideoJob) -> Features:
        assert self._videos is not None
        if not job.video.data:
            raise UnknownImage(
                "a video named by its uuid is no longer cached; send it again",
                param=job.video.path,
            )
        holdings, expected = job.context.holdings, job.most_bytes
        await holdings.take(Item.FEATURES, expected)
        try:
            features = await self._videos.process(
                job.key, job.video.data, job.work, job.context.record
            )
        except SaccadeError as error:  # all who wait for this video get the same one
            raise type(error)(error.message, param=job.video.path) from None
        holdings.note(Item.FEATURES, len(features.buffer) - expected)
        return features

    async def _in_pool(self, key: str, job: ImageJob, work: PixelsJob | ProcessJob) -> Features:
        assert self._pool is not None
        if not job.image.data:
            raise UnknownImage(
                "an image named by its uuid is no longer cached; send it again",
                param=job.image.path,
            )
        holdings, expected = job.context.holdings, _most_bytes(job, work)
        await holdings.take(Item.FEATURES, expected)
        try:
            features = await self._pool.process(key, job.image.data, work, job.context.record)
        except SaccadeError as error:  # all who wait for this picture get the same one
            raise type(error)(error.message, param=job.image.path) from None
        holdings.note(Item.FEATURES, len(features.buffer) - expected)
        return features

    def _shown(
        self,
        jobs: Sequence[ImageJob],
        placeholders: Sequence[Any],
        cached: Sequence[bool],
        *,
        capped: bool,
    ) -> list[ShownImage]:
        """What the prompt holds of each image.

        Raises:
            ImageTokenCap: an image has more tokens than allocated, and a cap applies.
        """
        shown = []
        for job, placeholder, was_cached in zip(jobs, placeholders, cached, strict=True):
            allocation, tokens = job.allocation, placeholder.get_num_embeds()
            if allocation is not None and tokens != allocation.tokens:
                log.error("an image has %d tokens instead of %d", tokens, allocation.tokens)
                if capped and tokens > allocation.tokens:
                    raise ImageTokenCap("the model takes more tokens", param=job.image.path)
            shown.append(
                shown_image(job.image.size, job.image.options, tokens, allocation, was_cached)
            )
        return shown

    def _measure(
        self, jobs: Sequence[ImageJob], context: RequestContext, kwargs: Mapping[str, Any]
    ) -> None:
        for job, image in zip(jobs, context.shown, strict=True):
            cap = "none"
            if job.allocation is not None:
                budget = context.max_image_tokens
                cap = self.allocator.effective_cap(job.image, job.allocation, budget, kwargs)
            metrics.image_tokens.labels(cap).observe(image.tokens)

    # ------------------------------------------------------------------ vLLM's own way

    def _decode_io(self, media_io_kwargs: Mapping[str, Mapping[str, object]] | None) -> DecodeIO:
        return DecodeIO.of({**self.image_io, **((media_io_kwargs or {}).get("image") or {})})

    async def _decode_image(self, job: ImageJob) -> Any:
        """The picture for vLLM's own processor; None if the client has not sent it this time."""
        if not job.image.data:
            return None
        work = job.work
        pixels_only = PixelsJob(work.format, work.size, work.frame, work.resize, work.io, work.crop)
        features = await self._in_pool(f"pixels-{job.key}", job, pixels_only)
        pixels = features.arrays(processors.tensor)["pixels"]
        picture = await asyncio.to_thread(lambda: Image.fromarray(pixels.numpy().copy()))
        return levels.as_item(self._modality, picture)


class PooledRenderer(MediaRenderer, ConversationRenderer):
    """Registered in the place of `HfRenderer`."""


def _most_bytes(job: ImageJob, work: PixelsJob | ProcessJob) -> int:
    """About how much memory the result of `work` takes at most, in bytes."""
    if isinstance(work, PixelsJob) or job.allocation is None:
        return _MOST_BYTES_PER_PIXEL * math.prod(work.resize or work.size)
    return _MOST_BYTES_PER_PIXEL * math.prod(job.allocation.processed)


def _unprocessable(context: RequestContext) -> ClientError:
    """The error for media that the model's processor fails on: clips, before images."""
    clips = (ref.path for ref in context.media if ref.kind in ("video", "audio"))
    first = (ref.path for ref in context.media)
    return ClientError(
        "the model's processor cannot process this part",
        param=next(clips, next(first, "messages")),
    )


def _dropped(context: RequestContext) -> ClientError:
    """The error for images that the chat template leaves out. Templates that do so mostly leave
    out what is not in the messages of users."""
    others = (ref.path for ref in context.media if ref.role not in (None, "user"))
    first = (ref.path for ref in context.media)
    return ClientError(
        "the chat template of this model leaves this image out; put it into a user message",
        param=next(others, next(first, "messages")),
    )


def _are(items: Any, kind: type) -> bool:
    """Whether `items` is a list of `kind`, and not empty."""
    return isinstance(items, list) and bool(items) and all(isinstance(it, kind) for it in items)


def _placeholders(rendered: Any, modality: str) -> Sequence[Any]:
    """Where the images are in a prompt; nowhere, if they went into an encoder of its own."""
    ranges: Sequence[Any] = rendered.get("mm_placeholders", {}).get(modality, ())
    return ranges


def _common_options(
    images: Sequence[EncodedImage],
    allocations: Sequence[TokenAllocation | None],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Processor options for a prompt whose images are processed together.

    Raises:
        ImageTokenCap: the images would need different ones.
    """
    wanted = [dict(allocation.options) if allocation else {} for allocation in allocations]
    for image, options in zip(images, wanted, strict=True):
        if options != wanted[0]:
            raise ImageTokenCap(
                "this model takes one token cap for all images of a request", param=image.path
            )
    return {**kwargs, **wanted[0]}

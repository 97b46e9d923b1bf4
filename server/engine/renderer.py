"""vLLM's Hugging Face renderer, with the image work handed to the worker pool.

What vLLM does in one thread for a whole prompt is done here image by image:

    key = hash(bytes, options, model)  ->  known to the engine?  nothing else to do
                                       ->  else pool.process(bytes)  ->  features
    prompt + features -> placeholders expanded -> engine input

Models whose processor overrides how vLLM merges or caches images keep vLLM's own way; they are
recognised by what their class overrides.
"""

import asyncio
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from blake3 import blake3
from cachetools import LRUCache
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput, mm_input
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.processing import BaseMultiModalProcessor, EncDecMultiModalProcessor
from vllm.multimodal.processing.processor import MultiModalProcessingResult
from vllm.renderers.hf import HfRenderer

from server import metrics
from server.config import Settings
from server.engine.cache import DeferredCache, PooledItem, Updates, own
from server.errors import ImageTooLarge, InvalidImage, SaccadeError, UnknownImage
from server.images.decode import DecodeOptions, decode
from server.images.features import Features
from server.images.pool import ImagePool
from server.media.payloads import EncodedImage

# A processor that overrides one of these does more than look at one image at a time.
_WHOLE_PROMPT_METHODS = (
    "apply",
    "_apply_hf_processor",
    "_cached_apply_hf_processor",
    "_merge_mm_kwargs",
    "_maybe_apply_prompt_updates",
)
_REMEMBERED_UUIDS = 100_000


def is_image_by_image(processor: BaseMultiModalProcessor[Any] | None) -> bool:
    """Whether `processor` treats each image of a prompt for itself, as vLLM's base class does."""
    if processor is None or isinstance(processor, EncDecMultiModalProcessor):
        return False
    return all(
        getattr(type(processor), name) is getattr(BaseMultiModalProcessor, name)
        for name in _WHOLE_PROMPT_METHODS
    )


class PooledRenderer(HfRenderer):
    """Registered in the place of `HfRenderer`. Without `attach` it is vLLM's, with the cache
    order settled at sending."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        if self._mm_processor_cache is not None:
            self._mm_processor_cache = DeferredCache(self._mm_processor_cache)
        self._pool: ImagePool | None = None
        self._fingerprint = b""
        self._attached = False
        self._max_pixels = 0
        self._digest_of_uuid: LRUCache[str, str] = LRUCache(_REMEMBERED_UUIDS)
        self._decode_threads = ThreadPoolExecutor(2, "image-decode")
        self._resources.callback(self._decode_threads.shutdown, wait=False, cancel_futures=True)
        self._vllm_process_multimodal = self._process_multimodal_async
        self._process_multimodal_async = self._process_images

    @property
    def deferred_cache(self) -> DeferredCache | None:
        cache = self._mm_processor_cache
        return cache if isinstance(cache, DeferredCache) else None

    def attach(self, settings: Settings, pool: ImagePool | None, max_pixels: int) -> None:
        """Take encoded images, and give them to `pool`; with None, to vLLM's own processor."""
        self._attached = True
        self._pool = pool
        self._max_pixels = max_pixels
        model = self.model_config
        parts = (
            "features-1",
            vllm_version,
            model.model,
            model.revision,
            str(model.dtype),
            settings.images.image_decode,
            model.get_multimodal_config().mm_processor_kwargs,
        )
        self._fingerprint = json.dumps(parts, sort_keys=True, default=str).encode()

    # ------------------------------------------------------------------ one prompt

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
        images = mm_data.get("image")  # a list, or a tensor of embeddings
        if (
            not isinstance(images, list)
            or not images
            or not self._attached
            or not all(image is None or isinstance(image, EncodedImage) for image in images)
        ):
            return await self._vllm_process_multimodal(
                prompt, mm_data, mm_uuids, mm_processor_kwargs, media_io_kwargs,
                skip_mm_cache=skip_mm_cache,
            )  # fmt: skip
        options = {
            "processor": dict(mm_processor_kwargs or {}),
            "io": dict((media_io_kwargs or {}).get("image") or {}),
        }
        uuids = list((mm_uuids or {}).get("image") or [None] * len(images))
        keys = self._keys(images, uuids, options)
        if self._pool is None or set(mm_data) != {"image"}:
            decoded = await self._decode(images, options["io"])
            return await self._vllm_process_multimodal(
                prompt, {**mm_data, "image": decoded}, {**(mm_uuids or {}), "image": keys},
                mm_processor_kwargs, media_io_kwargs, skip_mm_cache=skip_mm_cache,
            )  # fmt: skip
        process = self._process_here if skip_mm_cache else self._process_image
        items = await _all_or_none(map(process, images, keys, itertools.repeat(options)))
        return self._merge(prompt, keys, items)

    def _keys(
        self, images: Sequence[EncodedImage | None], uuids: Sequence[str | None], options: Any
    ) -> list[str]:
        """The cache key of each image: its bytes, the options and the model, in a namespace of
        their own. A client's uuid is a name for bytes it has sent, never a key."""
        encoded_options = json.dumps(options, sort_keys=True, default=str).encode()
        keys = []
        for image, uuid in zip(images, uuids, strict=True):
            if image is not None:
                digest = image.digest
                if uuid is not None:
                    self._digest_of_uuid[uuid] = digest
            elif uuid is not None and uuid in self._digest_of_uuid:
                digest = self._digest_of_uuid[uuid]
            else:
                raise UnknownImage(
                    "the part has no image data, and its uuid names none that was sent before",
                    part=uuid,
                )
            hasher = blake3(self._fingerprint)
            hasher.update(encoded_options)
            hasher.update(digest.encode())
            keys.append(hasher.hexdigest())
        return keys

    async def _process_image(
        self, image: EncodedImage | None, key: str, options: Any
    ) -> tuple[MultiModalKwargsItem, Updates]:
        cache = self.deferred_cache
        item = PooledItem()
        if image is not None:
            item.refill = functools.partial(self._features_of, image, key, options)
        if cache is not None and cache.is_cached_item(key):
            metrics.image_lookups.labels("hit").inc()
            return item, cache.updates(key)
        if image is None:
            raise UnknownImage("an image named by its uuid is no longer cached; send it again")
        metrics.image_lookups.labels("miss").inc()
        features, updates = await self._process(image, key, options)
        item.update(features)
        if cache is not None:
            cache.remember(key, updates)
        return item, updates

    async def _process_here(
        self, image: EncodedImage | None, key: str, options: Any
    ) -> tuple[MultiModalKwargsItem, Updates]:
        """For requests that only count tokens: the features stay here."""
        cache = self._mm_processor_only_cache
        if cache is not None and cache.is_cached_item(key):
            item, updates = cache.get_and_update_item(None, key)
            return item, updates  # type: ignore[return-value]
        if image is None:
            raise UnknownImage("an image named by its uuid is no longer cached; send it again")
        item, updates = await self._process(image, key, options)
        if cache is not None:
            kept = await asyncio.to_thread(own, item)  # the copy grows with the image
            cache.get_and_update_item((kept, updates), key)
        return item, updates

    async def _features_of(self, image: EncodedImage, key: str, options: Any) -> Any:
        item, _ = await self._process(image, key, options)
        return item

    async def _process(
        self, image: EncodedImage, key: str, options: Any
    ) -> tuple[MultiModalKwargsItem, Updates]:
        assert self._pool is not None
        try:
            features = await self._pool.process(key, image.data, options)
        except SaccadeError as error:  # all who wait for this picture get the same one
            raise type(error)(error.message, part=image.url) from None
        return self._to_item(features, options["processor"])

    # ------------------------------------------------------------------ vLLM's shapes

    def _to_item(
        self, features: Features, kwargs: Mapping[str, Any]
    ) -> tuple[MultiModalKwargsItem, Updates]:
        """One image's features as vLLM's item, and what they put into the prompt."""
        processor = self.get_mm_processor()
        outputs = BatchFeature(features.arrays(_tensor))
        config = processor._get_mm_fields_config(outputs, kwargs)
        items = MultiModalKwargsItems.from_hf_inputs(outputs, config)
        sized = processor.info.parse_mm_data({"image": [_sized(features.size)]}, validate=False)
        updates = processor._get_mm_prompt_updates(sized, kwargs, items)
        return items["image"][0], updates["image"][0]

    def _merge(
        self, prompt: list[int], keys: list[str], items: Sequence[tuple[Any, Updates]]
    ) -> MultiModalInput:
        processor = self.get_mm_processor()
        updates = [
            [processor._recompute_cached_prompt_update(update, index) for update in item_updates]
            for index, (_, item_updates) in enumerate(items)
        ]
        result = MultiModalProcessingResult(
            prompt_ids=processor._postprocess_prompt(prompt),
            kwargs=MultiModalKwargsItems({"image": [item for item, _ in items]}),
            hashes={"image": keys},
            prompt_updates={"image": updates},
        )
        counts: Any = SimpleNamespace(get_all_counts=lambda: {"image": len(items)})
        token_ids, placeholders = processor._maybe_apply_prompt_updates(counts, result)
        self.update_mm_cache_stats()
        return mm_input(
            prompt_token_ids=token_ids,
            mm_kwargs=result.kwargs,
            mm_hashes=result.hashes,
            mm_placeholders={
                modality: [found.to_range() for found in ranges]
                for modality, ranges in placeholders.items()
            },
        )

    # ------------------------------------------------------------------ vLLM's own way

    async def _decode(self, images: Sequence[EncodedImage | None], io: Any) -> list[Any]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(
                loop.run_in_executor(self._decode_threads, self._decode_one, image, io)
                for image in images
            )
        )

    def _decode_one(self, image: EncodedImage | None, io: Any) -> Any:
        if image is None:
            return None
        loader = ImageMediaIO(**{"image_mode": "RGB", **io})
        options = DecodeOptions(loader.image_mode, loader.rgba_background_color, self._max_pixels)
        try:
            return decode(image.data, options).image
        except (InvalidImage, ImageTooLarge) as error:
            error.part = image.url
            raise


async def _all_or_none(work: Iterable[Any]) -> list[Any]:
    """Gather; the first failure cancels the rest, whose results nobody would use."""
    async with _unwrapped(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in work]
    return [task.result() for task in tasks]


class _unwrapped:
    """Raises the first error of a task group as itself."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def _tensor(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> torch.Tensor:
    """A tensor over shared memory; it keeps `buffer` alive."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    flat = torch.frombuffer(buffer, dtype=_DTYPES[dtype], count=count, offset=offset)
    return flat.view(shape)


def _sized(size: tuple[int, int]) -> Image.Image:
    """A picture that has a size and no pixels: all that prompt updates ask for."""
    image = Image.Image()
    image._size = size
    image._mode = "RGB"
    return image

"""What videos would cost, computed from their headers alone; the model does not run."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.transformers_utils.processor import get_video_processor_cls_name

from server.engine.token_allocator import (
    ImageCost,
    Sized,
    costs_of,
    image_costs,
    kv_bytes_of_token,
)
from server.engine.video_allocator import VideoAllocator
from server.engine.video_sampling import encoded_video
from server.engine.vllm_adapter.video_loaders import LoaderUnsupported
from server.errors import ClientError
from server.imaging.tokens.video import VideoAllocation, VideoRule
from server.imaging.video.encoded import EncodedVideo
from server.request.context import ShownVideo
from server.request.media import MediaRef

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass(frozen=True)
class VideoCost:
    """How a video would be shown, the length of its placeholder in the prompt, and the bytes of KV
    cache that it would take."""

    shown: ShownVideo
    prompt_tokens: int
    kv_bytes: int


def encoded_videos(engine: "AsyncLLM", refs: Sequence[MediaRef], most: int) -> list[EncodedVideo]:
    """The videos of a request with the frames that the model would get; `most`: frames that a video
    may show. The time grows with their frames.

    Raises:
        ClientError: a request with these videos would fail in the same way, or the tokens of a
            video are not known before it is decoded.
    """
    if not refs:
        return []
    model = engine.model_config
    config = model.get_multimodal_config()
    options = config.media_io_kwargs.get("video") or {}
    video_processor = get_video_processor_cls_name(model)
    return [_encoded(ref, options, video_processor, most) for ref in refs]


def _encoded(
    ref: MediaRef, options: Mapping[str, Any], video_processor: str | None, most: int
) -> EncodedVideo:
    try:
        return encoded_video(ref, options, video_processor, most)
    except LoaderUnsupported:
        raise _unknown(ref.path) from None


def _unknown(path: str) -> ClientError:
    return ClientError("the tokens of this video cannot be computed in advance", param=path)


async def media_costs(
    engine: "AsyncLLM",
    sized: Sized,
    paths: Sequence[str],
    videos: Sequence[EncodedVideo],
    budget: int | None,
    *,
    with_views: bool,
) -> tuple[list[ImageCost], list[VideoCost]]:
    """The cost of each picture, given by its size, and of each video. `paths` are the places of the
    pictures in the request. Raises as `image_costs` does."""
    if not videos:
        costs = await image_costs(engine, sized, paths, budget, with_views=with_views)
        return costs, []
    renderer: Any = engine.renderer  # vLLM types it as its base class
    allocator: VideoAllocator | None = getattr(renderer, "video_allocator", None)
    if allocator is None:
        raise _unknown(videos[0].path)
    places = [*paths, *(video.path for video in videos)]
    pictures, clips = await allocator.costs(sized, videos, places, budget)
    rule, kv_bytes = allocator.rule({}), kv_bytes_of_token(engine.vllm_config)
    found = [
        await asyncio.to_thread(_cost, rule, kv_bytes, *pair)
        for pair in zip(videos, clips, strict=True)
    ]
    return costs_of(engine, renderer.allocator, sized, pictures, with_views=with_views), found


def _cost(
    rule: VideoRule, kv_bytes: int, video: EncodedVideo, allocation: VideoAllocation
) -> VideoCost:
    """The time grows with the number of frames. `kv_bytes` are those of one token."""
    chosen = video.chosen.limited(allocation.frames, allocation.frames)
    tokens = rule.prompt_tokens(allocation, _times(chosen.metadata))
    return VideoCost(ShownVideo.of(video, chosen, allocation), tokens, tokens * kv_bytes)


def _times(metadata: dict[str, Any]) -> list[float]:
    """The times of the frames as the processor computes them, in seconds."""
    fps = metadata["fps"]
    return [index / fps if fps else 0.0 for index in metadata["frames_indices"]]

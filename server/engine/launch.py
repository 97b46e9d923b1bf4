"""Starts vLLM inside this process, with Saccade's renderer, media connector and send pipeline."""

import copy
import importlib.util
import io
import os
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.inputs import MultiModalInput
from vllm.logger import init_logger
from vllm.multimodal.inputs import nested_tensors_equal
from vllm.platforms import current_platform
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from server.concurrency import usable_memory
from server.engine import clips, connector, video_extractor
from server.engine.embedding_cache import setup
from server.engine.embedding_cache.control import ControlServer
from server.engine.extractor import worker_spec
from server.engine.heartbeat import Heartbeat
from server.engine.restarts import Restarts
from server.engine.token_allocator import Crowd, TokenAllocator
from server.engine.token_rules import measured_rule, token_rule
from server.engine.video_allocator import VideoAllocator
from server.engine.video_token_rules import measured_video_rule, metadata_of, video_rule
from server.engine.vllm_adapter import (
    core_fork,
    core_restart,
    core_sockets,
    item_encoder,
    item_tracker,
    other_renderers,
    processor_cache,
    quick_start,
    remote_core,
    several_clients,
    shared_segments,
    stat_logger,
    video_loaders,
)
from server.engine.vllm_adapter.engine_caches import EngineCaches, keep_item_limit
from server.engine.vllm_adapter.group_names import keep_groups_apart
from server.engine.vllm_adapter.levels import images_apart, modality_of, takes_images
from server.engine.vllm_adapter.outcomes import Outcomes
from server.engine.vllm_adapter.parameters import Parameters
from server.engine.vllm_adapter.processor_cache import ProcessorCache
from server.engine.vllm_adapter.remote_core import RemoteEngines
from server.engine.vllm_adapter.renderer import MediaRenderer, PooledRenderer
from server.engine.vllm_adapter.send import Gate, Sender
from server.engine.vllm_adapter.stall import fail_requests
from server.errors import CannotStart, ImageTokenCap
from server.front_ends import FrontEnd, control_address
from server.imaging.encoded import ImageLimits, ImageOptions, encoded
from server.imaging.sizing import Size
from server.imaging.tokens import TokenRule
from server.imaging.tokens.video import VideoRule
from server.imaging.video.limits import VideoLimits
from server.ingest.video import ClipDecoder
from server.ingest.video_features import VideoExtractor
from server.request.admission import AdmissionLimits
from server.request.budgets import Resource
from server.request.context import RequestContext, entered
from server.request.media import MediaLimits
from server.settings import GIB, MIB, HttpSettings, Settings
from server.telemetry import metrics
from server.telemetry.record import Record
from server.workers.forkserver import Forkserver
from server.workers.pool import ImagePool
from server.workers.worker import WorkerSpec

logger = init_logger(__name__)

_MEDIA_SHARE_OF_MEMORY = 1 / 8
# Image tokens of running requests, in KV caches. Images that requests share count for each of them.
_KV_CACHES = 8
# Requests for each image worker whose images are fetched or decoded while the engine is busy.
_AHEAD_PER_WORKER = 4
# One in so many of the requests in the engine waits there, or is kept free of batches.
_SPARE_SHARE = 8


@dataclass(frozen=True)
class PreparedEngine:
    """The configuration of an engine that has not started. `workers` is None for text-only
    models, `remote` if the engine is not one of other processes."""

    config: VllmConfig
    engine_args: AsyncEngineArgs
    workers: WorkerSpec | None
    remote: RemoteEngines | None = None


def fork_engine_core() -> None:
    """Fork the process for the engine core, which then need not import vLLM. Call it before
    anything else is done with vLLM.

    Only on a CPU: it has not been tested with libraries for GPUs.
    """
    if current_platform.is_cpu():
        core_fork.prepare()


def prepare(
    args: Namespace,
    settings: Settings,
    mine: FrontEnd | None = None,
    remote: RemoteEngines | None = None,
) -> PreparedEngine:
    """Read the model's configuration and register Saccade's parts in place of vLLM's. `mine` is
    this process, if it is one of several front ends; `remote` are its engines, if they are those of
    other machines."""
    prepared = configured(args, settings, mine.count if mine is not None else 1)
    if remote is not None:
        remote_core.adapt_front(prepared.config)
        prepared = replace(prepared, remote=remote)
    model = prepared.config.model_config
    if not model.supports_multimodal_inputs:
        return prepared
    workers = worker_spec(
        model,
        fast=settings.images.image_decode == "fast",
        max_pixels=limits(settings).max_pixels,
        pdf_page_timeout_s=settings.images.pdf_page_timeout_s,
        max_memory_bytes=settings.images.image_worker_memory_mb * MIB,
        sandbox=settings.images.worker_sandbox,
    )
    return replace(prepared, workers=workers)


def configured(args: Namespace, settings: Settings, front_ends: int) -> PreparedEngine:
    """`prepare` without what image workers need.

    Raises:
        CannotStart: these flags do not go with several front ends, with `--restart-engine`, or not
            with each other.
    """
    os.environ["VLLM_MEDIA_CONNECTOR"] = connector.NAME
    RENDERER_REGISTRY.renderers["hf"] = ("server.engine.vllm_adapter.renderer", "PooledRenderer")
    other_renderers.install()
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    setup.encode_only(engine_args, settings.caches)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    clips.use_cpu_decoders(config)
    clips.keep_ffmpeg_out()
    quick_start.register()
    stat_logger.register()
    core_sockets.install()
    processor_cache.install()
    video_loaders.install()
    if settings.http.restart_engine:
        core_restart.adapt(config, front_ends)
    if front_ends > 1:
        several_clients.adapt(config, front_ends)
    return PreparedEngine(config, engine_args, None)


def limits(settings: Settings) -> ImageLimits:
    """The limits of an image. For its pixels, the stricter of Saccade's and vLLM's limit
    applies."""
    images = settings.images
    pixels = [limit for limit in (images.max_image_pixels, envs.VLLM_MAX_IMAGE_PIXELS) if limit > 0]
    return ImageLimits(
        max_bytes=images.max_image_bytes,
        max_pixels=min(pixels),
        max_side=images.max_image_side,
        max_aspect_ratio=images.max_image_aspect_ratio,
    )


def video_limits(settings: Settings) -> VideoLimits:
    """The limits for a video, by its header."""
    videos, pixels = settings.videos, limits(settings).max_pixels
    return VideoLimits(
        max_pixels=min(videos.max_video_pixels, pixels),
        max_seconds=videos.max_video_seconds,
        max_frames=videos.max_video_frames,
    )


def clip_decoder(settings: Settings, forkserver: Forkserver) -> ClipDecoder:
    """The decoder of videos and audio clips, which runs in forks of the workers' forkserver."""
    most = video_limits(settings).max_pixels
    return ClipDecoder(clips.PREPARE, settings.videos, most, forkserver)


def admission_limits(
    engine: AsyncLLM, settings: Settings, front_ends: int = 1, engines: int = 1
) -> AdmissionLimits:
    """By default as many requests run as keep the engine busy, and some whose images are still
    fetched and decoded; others wait here, where their order is fair. Only a few wait in the engine,
    which needs them to fill its next batch in time. Requests of batches leave room for a few others
    in the engine. Each of several front ends has its part of the places of all engines."""
    config = engine.vllm_config
    engines *= config.parallel_config.data_parallel_size
    places = config.scheduler_config.max_num_seqs * engines
    seqs = -(-places // front_ends)
    ahead = seqs // 4 + _AHEAD_PER_WORKER * settings.images.image_workers
    admission = settings.admission
    return AdmissionLimits(
        running=admission.max_running_requests or seqs + ahead,
        waiting=admission.max_waiting_requests,
        wait_s=admission.max_wait_s,
        in_engine=seqs + max(1, seqs // _SPARE_SHARE),
        background=max(1, seqs - max(1, seqs // _SPARE_SHARE)),
        totals={
            Resource.MEDIA: _media_bytes(settings),
            Resource.IMAGE_TOKENS: admission.max_running_image_tokens
            or _image_tokens(config, engines) // front_ends,
        },
        engine_requests=config.scheduler_config.max_num_queued_reqs,
        group_share=admission.max_group_share,
    )


def _media_bytes(settings: Settings) -> int:
    given = settings.admission.media_memory_gb
    return int(usable_memory() * _MEDIA_SHARE_OF_MEMORY if given is None else given * GIB)


def _image_tokens(config: VllmConfig, engines: int) -> int:
    """The default for the image tokens of running requests in `engines`."""
    cache = config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    if config.is_mm_encoder_only:  # which has no KV cache
        tokens = config.scheduler_config.encoder_cache_size
    return max(_KV_CACHES * tokens * engines, config.model_config.max_model_len)


def media_limits(engine: AsyncLLM, settings: Settings) -> MediaLimits | None:
    """The limits for the media of a request: the stricter of Saccade's and the model's. None if the
    model takes no media."""
    if engine.renderer.mm_processor is None:
        return None
    processor = engine.renderer.get_mm_processor()
    allowed = processor.info.allowed_mm_limits
    images = settings.images
    return MediaLimits(
        max_images=min(images.max_request_images, allowed.get(modality_of(processor), 0)),
        max_clips={kind: allowed[kind] for kind in ("video", "audio") if kind in allowed},
        max_frames=images.max_image_frames,
        max_pages=images.pdf_max_pages,
        max_page_characters=images.pdf_max_text_chars,
        pdf_dpi=images.pdf_dpi,
        image=limits(settings),
        max_clip_bytes=settings.videos.max_video_bytes,
        max_shown_frames=settings.videos.max_video_frames_shown,
        video=video_limits(settings),
    )


def tokens_of_images(engine: AsyncLLM) -> Callable[[Size, ImageOptions], int | None]:
    """See `TokenAllocator.tokens`; gives None where the model's images are processed by vLLM."""
    renderer: Any = engine.renderer  # vLLM types it as its base class

    def tokens(size: Size, options: ImageOptions) -> int | None:
        allocator: TokenAllocator | None = getattr(renderer, "allocator", None)
        return None if allocator is None else allocator.tokens(size, options)

    return tokens


def accepted_embeddings(engine: AsyncLLM) -> frozenset[str]:
    """The types of content parts with embeddings that the server's flags allow."""
    model = engine.model_config
    accepted = {"prompt_embeds"} if model.enable_prompt_embeds else set()
    if model.multimodal_config is not None and model.multimodal_config.enable_mm_embeds:
        accepted |= {"image_embeds", "audio_embeds", "video_embeds"}
    return frozenset(accepted)


def add_embedding_cache(
    prepared: PreparedEngine, settings: Settings, mine: FrontEnd | None = None
) -> ControlServer | None:
    """Configure the embedding cache; returns its control server, or None without a cache."""
    if not _has_embedding_cache(prepared, settings):
        return None
    control = ControlServer(control_address(mine.folder, mine.index) if mine is not None else None)
    memory = None
    if settings.http.restart_engine:
        memory = control.memory = setup.lasting_memory(prepared.config, settings.caches)
    setup.configure(prepared.config, settings.caches, [control.address], memory)
    return control


def configure_embedding_cache(
    prepared: PreparedEngine, settings: Settings, controls: Sequence[str]
) -> None:
    """Configure the embedding cache, if there is one, for control servers in other processes."""
    if _has_embedding_cache(prepared, settings):
        setup.configure(prepared.config, settings.caches, controls)


def _has_embedding_cache(prepared: PreparedEngine, settings: Settings) -> bool:
    if prepared.config.model_config.supports_multimodal_inputs:
        setup.size_gpu_tier(prepared.config, settings.caches)
    return setup.is_wanted(prepared.config, settings.caches)


@asynccontextmanager
async def running(
    prepared: PreparedEngine,
    settings: Settings,
    outcomes: Outcomes,
    gate: Gate,
    mine: FrontEnd | None = None,
) -> AsyncIterator[tuple[AsyncLLM, Heartbeat, Restarts | None]]:
    """Run the engine, from start to shutdown. `outcomes` follows its requests, which pass `gate`
    before they are sent. Starting blocks the event loop, as in vLLM. With `--restart-engine`, the
    third result starts it again when it has died or hangs.

    With `mine`, the engine was started by another process, and is only reached from here."""
    torch.set_num_threads(1)  # this process only moves data; workers and engine use the cores
    can_restart = settings.http.restart_engine and prepared.remote is None
    before = copy.deepcopy(prepared.config) if can_restart else None
    engine = _started(prepared, mine)
    remote_core.join(engine)
    try:
        if mine is not None:
            await several_clients.join(engine, mine)
        await engine.reset_mm_cache()  # waits for the warm-up, and drops its items
        outcomes.follow(engine)
        starter = None
        heartbeat = Heartbeat(
            engine.is_sleeping,
            settings.http.engine_stall_timeout_s,
            lambda: _end_stalled(engine, starter),
        )
        Parameters(engine, settings.constraints, heartbeat)
        sender = Sender(engine, _processor_cache(engine), outcomes, gate)
        item_encoder.install(engine)
        keep_groups_apart(engine.renderer)
        if engine.renderer.mm_processor is not None:
            item_tracker.install(engine.renderer)
        keep_item_limit(engine)
        enable_envs_cache()  # as in vLLM's other processes: each request reads many of them
        restarts = None
        if before is not None:
            starter = _starter(engine, before, sender)
            restarts = _restarts(engine, starter, settings.http)
        async with heartbeat:
            yield engine, heartbeat, restarts
    finally:
        disable_envs_cache()
        engine.shutdown(timeout=prepared.config.shutdown_timeout)


def _started(prepared: PreparedEngine, mine: FrontEnd | None) -> AsyncLLM:
    """Raises CannotStart if one of the engine's processes has left a reason for its end."""
    options: dict[str, Any] = {} if mine is None else several_clients.options(mine)
    try:
        with several_clients.reaching(mine), remote_core.reaching(prepared.remote):
            return AsyncLLM.from_vllm_config(
                vllm_config=prepared.config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=prepared.engine_args.enable_log_requests,
                aggregate_engine_logging=prepared.engine_args.aggregate_engine_logging,
                disable_log_stats=prepared.engine_args.disable_log_stats,
                **options,
            )
    except RuntimeError:
        if (reason := shared_segments.reason()) is None:
            raise
        raise CannotStart(reason) from None


async def _end_stalled(engine: AsyncLLM, starter: core_restart.CoreStarter | None) -> None:
    """The engine does not answer: end its requests. If it can be started again, it will be."""
    if starter is not None:
        starter.give_up_core()
    await fail_requests(engine)


def _starter(engine: AsyncLLM, config: VllmConfig, sender: Sender) -> core_restart.CoreStarter:
    def attach(engine: AsyncLLM) -> None:
        item_encoder.install(engine)
        sender.attach()

    return core_restart.CoreStarter(engine, config, attach)


def _restarts(
    engine: AsyncLLM, starter: core_restart.CoreStarter, settings: HttpSettings
) -> Restarts:
    return Restarts(
        lambda: engine.errored,
        starter.start_again,
        settings.max_engine_restarts,
        settings.engine_restart_window_s,
    )


def _processor_cache(engine: AsyncLLM) -> ProcessorCache | None:
    renderer: Any = engine.renderer  # vLLM types it as its base class
    return renderer.processor_cache if isinstance(renderer, MediaRenderer) else None


@dataclass(frozen=True)
class ImagePath:
    """Which steps the pool does for images. `encoded`: images stay encoded up to the renderer, and
    the pool decodes them. `pooled`: it also preprocesses them."""

    encoded: bool
    pooled: bool


def caches_of(
    engine: AsyncLLM, embeddings: ControlServer | None, gate: Gate, *, is_only: bool
) -> EngineCaches:
    """The caches of a running engine."""
    features = _processor_cache(engine)
    if features is not None:
        metrics.features_bytes.set_function(lambda: features.size().bytes or 0)
    return EngineCaches(engine, features, embeddings, gate, is_only=is_only)


async def connect(
    engine: AsyncLLM,
    settings: Settings,
    pool: ImagePool,
    decoder: ClipDecoder,
    embeddings: ControlServer | None,
) -> ImagePath:
    """Connect the engine's images to `pool`, as far as the model supports it, and its videos and
    audio clips to `decoder`.

    vLLM preprocesses images itself if the model's processor needs the whole prompt, or if the
    pool's result differs from vLLM's for a test picture. A renderer that is not vLLM's gets decoded
    pictures.

    Raises:
        CannotStart: the model cannot keep images within `max_image_tokens`.
    """
    renderer: Any = engine.renderer  # vLLM types it as its base class
    takes_encoded = isinstance(renderer, MediaRenderer) and takes_images(renderer.mm_processor)
    if renderer.mm_processor is not None:
        connector.HandleConnector.modality = modality_of(renderer.mm_processor)
    connector.HandleConnector.pool = None if takes_encoded else pool
    connector.HandleConnector.clips = decoder
    connector.HandleConnector.max_shown_frames = settings.videos.max_video_frames_shown
    connector.HandleConnector.max_video_tokens = settings.videos.max_video_tokens
    if isinstance(renderer, PooledRenderer):
        renderer.keep_typed_placeholders()
    if not takes_encoded:
        return ImagePath(encoded=False, pooled=False)
    allocator = _token_allocator(renderer, settings)
    fits = images_apart(type(renderer.mm_processor)) != 0
    renderer.attach(settings, pool, allocator, pooled=fits)
    if fits and not await _agrees(renderer):
        logger.warning("the image pool does not support this model; using vLLM's preprocessing")
        renderer.attach(settings, pool, allocator, pooled=False)
        fits = False
    connector.HandleConnector.encodes_videos = fits and await _takes_videos(
        renderer, allocator, decoder, settings
    )
    if settings.videos.max_video_tokens and not connector.HandleConnector.encodes_videos:
        logger.warning("--max-video-tokens: videos are refused, since vLLM preprocesses them")
    seeks = settings.caches.embedding_cache_dir or settings.caches.embedding_cache_url
    if embeddings is not None and seeks:
        renderer.announce = embeddings.prefetch
    return ImagePath(encoded=True, pooled=fits)


async def _takes_videos(
    renderer: MediaRenderer, images: TokenAllocator, decoder: ClipDecoder, settings: Settings
) -> bool:
    """Attach the path of videos to `renderer`, if the model takes videos, and a child process and
    vLLM give a test video the same tokens, placeholders and features."""
    processor = renderer.get_mm_processor()
    accepted = set(processor.info.allowed_mm_limits)
    config = renderer.model_config.get_multimodal_config()
    if "video" not in accepted or "audio" in accepted or config.enable_mm_embeds:
        return False
    if importlib.util.find_spec("av") is None:
        return False

    def make_rule(options: Mapping[str, Any]) -> VideoRule:
        return video_rule(processor, options) or measured_video_rule(processor, options)

    allocator = VideoAllocator(make_rule, images, settings.videos.max_video_tokens)
    renderer.attach_videos(VideoExtractor(video_extractor.PREPARE, decoder), allocator)
    if await _agrees_on_videos(renderer):
        return True
    logger.warning("child processes do not support videos of this model; using vLLM's processor")
    renderer.detach_videos()
    return False


async def _agrees_on_videos(renderer: MediaRenderer) -> bool:
    """The same as `_agrees`, of a video."""
    processor = renderer.get_mm_processor()
    text = processor.dummy_inputs.get_dummy_text({"video": 1})
    prompt = renderer.get_tokenizer().encode(text, add_special_tokens=False)
    noise = np.random.default_rng(0).integers(0, 256, (4, 122, 233, 3), dtype=np.uint8)
    try:
        with entered(RequestContext(Record())):
            ours, theirs = renderer.both_ways_of_video(prompt, noise, metadata_of(range(4)))
    except Exception:
        logger.exception("the path of videos failed on the test video")
        return False
    finally:
        renderer.clear_mm_cache()
    return _equal(ours, theirs, "video")


# A picture, (width, height), that the model must be able to show within the server's cap.
_USUAL_SIZE = (640, 480)


def _token_allocator(renderer: MediaRenderer, settings: Settings) -> TokenAllocator:
    """Raises CannotStart if the model cannot meet the server's cap."""
    processor, cap = renderer.get_mm_processor(), settings.images.max_image_tokens
    apart = images_apart(type(processor))

    def make_rule(options: Mapping[str, Any]) -> TokenRule:
        return token_rule(processor, options) or measured_rule(processor, options)

    def make_crowd_rule(options: Mapping[str, Any]) -> TokenRule:
        return measured_rule(processor, options, copies=max(apart or 0, 1) + 1)

    crowd = None if apart is None else Crowd(max(apart, 1), make_crowd_rule)
    allocator = TokenAllocator(make_rule, cap, crowd)
    try:
        allocator.rule({}).allocate(*_USUAL_SIZE, cap)
    except ImageTokenCap as error:
        raise CannotStart(f"--max-image-tokens {cap}: {error.message}") from None
    return allocator


async def _agrees(renderer: MediaRenderer) -> bool:
    """Whether pool and vLLM give one picture the same tokens, placeholders and features."""
    processor = renderer.get_mm_processor()
    text = processor.dummy_inputs.get_dummy_text({modality_of(processor): 1})
    prompt = renderer.get_tokenizer().encode(text, add_special_tokens=False)
    noise = np.random.default_rng(0).integers(0, 256, (222, 333, 3), dtype=np.uint8)
    picture, file = Image.fromarray(noise), io.BytesIO()
    picture.save(file, "PNG")
    image = encoded(file.getvalue(), ImageLimits(1 << 20, 1 << 20, 1 << 10, 10))
    try:
        with entered(RequestContext(Record())):
            ours, theirs = await renderer.both_ways(prompt, image, picture)
    except Exception:
        logger.exception("the image pool failed on the test picture")
        return False
    finally:
        renderer.clear_mm_cache()
    return _equal(ours, theirs, modality_of(processor))


def _equal(ours: MultiModalInput, theirs: MultiModalInput, modality: str) -> bool:
    """Whether two inputs of the engine have the same tokens and features."""
    if ours["prompt_token_ids"] != theirs["prompt_token_ids"]:
        return False
    pairs = zip(ours["mm_kwargs"][modality], theirs["mm_kwargs"][modality], strict=True)
    return all(
        mine is not None
        and other is not None
        and mine.keys() == other.keys()
        and all(same_data(mine[name].data, other[name].data) for name in mine)
        for mine, other in pairs
    )


def same_data(ours: object, theirs: object) -> bool:
    """Whether two fields of an item are equal."""
    if isinstance(ours, int | float | np.number):
        return bool(ours == theirs)
    return nested_tensors_equal(ours, theirs)  # type: ignore[arg-type]

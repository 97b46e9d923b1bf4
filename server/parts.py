"""The services behind the app: starts the engine, the image pool and the media loader.

prepared engine -> worker preload | engine start -> pool
"""

import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator

from server.engine import control_words, launch, vllm_http
from server.engine.heartbeat import Heartbeat
from server.engine.restarts import Restarts
from server.engine.vllm_adapter import cpu_waits, several_clients
from server.engine.vllm_adapter.encode_timing import EncodeTimes
from server.engine.vllm_adapter.engine_queue import EngineQueue
from server.engine.vllm_adapter.outcomes import Outcomes
from server.engine.vllm_adapter.remote_core import RemoteEngines
from server.engine.vllm_adapter.send import Gate
from server.errors import CannotStart
from server.front_ends import FrontEnd, encoder_address, usage_lock
from server.http.app import Parts, byte_budget, model_name
from server.http.peers import Peers
from server.ingest.expand import Expander
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.fetch_cache import FetchCache
from server.ingest.load import MediaLoader
from server.ingest.reduce import Reducer
from server.replica import Replica
from server.request.admission import Admission
from server.request.bounds import BodyBounds
from server.request.grounding import of_model
from server.request.media import MediaLimits
from server.request.read import RequestReader
from server.request.shared_usage import SharedUsages
from server.settings import GIB, HttpSettings, Settings
from server.telemetry import metrics
from server.upload_folder import Report, files_of
from server.workers.memory import return_regularly
from server.workers.pool import ImagePool

# A group may have this share of the image workers, whatever its share of the engine is: a worker is
# free again after some milliseconds.
_LEAST_WORKER_SHARE = 0.5


@contextlib.asynccontextmanager
async def running(
    args: Namespace,
    settings: Settings,
    report: Report,
    mine: FrontEnd | None = None,
    remote: RemoteEngines | None = None,
) -> AsyncIterator[Parts]:
    """Start the engine, the image pool and the fetcher concurrently; stop them in reverse order.
    One of several front ends, `mine`, starts no engine, nor does the front of `remote` engines."""
    if mine is None:
        report(f"reading the model {model_name(args)}")
    elif mine.engines.image_work is not None:
        cpu_waits.join(mine.engines.image_work)
    prepared = launch.prepare(args, settings, mine, remote)
    peer = mine or Replica.current()
    async with contextlib.AsyncExitStack() as stack:
        fetcher = await stack.enter_async_context(_fetcher(args, settings))
        store, files = await files_of(stack, settings, report, peer)
        pool = _preloaded_pool(stack, prepared, settings)
        if mine is None and remote is None:
            report(f"starting the engine on {prepared.config.device_config.device_type}")
        embeddings = None
        if remote is None:  # else it is theirs
            embeddings = launch.add_embedding_cache(prepared, settings, mine)
        if embeddings is not None:
            await stack.enter_async_context(embeddings)
            stack.enter_context(metrics.embedding_cache(embeddings.snapshots))
        gate = Gate()
        engine, heartbeat, restarts = await _engine(stack, prepared, settings, gate, mine)
        engine_caches = launch.caches_of(
            engine, embeddings, gate, is_only=mine is None and remote is None
        )
        if pool is not None:
            report(f"starting {settings.images.image_workers} image workers")
            await stack.enter_async_context(pool)
            report(f"image workers are confined by {pool.confinement}")
        return_regularly()
        limits = launch.media_limits(engine, settings)
        loader = None
        if pool is not None and limits is not None:
            plain = control_words.parting(engine.renderer.tokenizer)
            expander = Expander(pool, limits, plain)
            tokens = launch.tokens_of_images(engine)
            reducer = Reducer(pool, settings.images.auto_detail, tokens)
            local = args.allowed_local_media_path
            loader = MediaLoader(fetcher, limits, local, files, expander, reducer)
            clips = launch.clip_decoder(settings, pool.forkserver)
            stack.callback(clips.close)
            path = await launch.connect(engine, settings, pool, clips, embeddings)
            if not path.encoded:
                report("this model preprocesses its images in vLLM")
        yield Parts(
            engine=engine,
            heartbeat=heartbeat,
            restarts=restarts,
            caches=engine_caches,
            fetch_cache=fetcher.cache,
            pool=pool,
            reader=_reader(engine, settings.http, limits),
            loader=loader,
            files=store,
            admission=_admission(engine, settings, restarts, peer, remote),
            bodies=byte_budget(settings.http),
            peers=_peers(mine, engine) if mine is not None else None,
            engines=remote.transport.count if remote is not None else None,
        )


def _preloaded_pool(
    stack: contextlib.AsyncExitStack, prepared: launch.PreparedEngine, settings: Settings
) -> ImagePool | None:
    """The image workers, which begin to load; None if the model takes no images."""
    if prepared.workers is None:
        return None
    share = max(settings.admission.max_group_share, _LEAST_WORKER_SHARE)
    pool = ImagePool(prepared.workers, settings.images, cpu_waits.note_work, share)
    stack.callback(pool.stop_preload)
    pool.preload()
    return pool


async def _engine(
    stack: contextlib.AsyncExitStack,
    prepared: launch.PreparedEngine,
    settings: Settings,
    gate: Gate,
    mine: FrontEnd | None,
) -> tuple[vllm_http.AsyncLLM, Heartbeat, Restarts | None]:
    """The running engine, which reports how long it encodes."""
    outcomes = Outcomes()
    reports = encoder_address(mine.folder, mine.index) if mine is not None else None
    times = await stack.enter_async_context(EncodeTimes(outcomes.encoded, reports))
    outcomes.read_reports = times.read
    running = launch.running(prepared, settings, outcomes, gate, mine)
    return await stack.enter_async_context(running)


def _reader(
    engine: vllm_http.AsyncLLM, settings: HttpSettings, limits: MediaLimits | None
) -> RequestReader:
    grounding = of_model(engine.model_config.hf_config.model_type)
    embeds = launch.accepted_embeddings(engine)
    return RequestReader(limits, embeds, body_bounds(settings), grounding)


def _admission(
    engine: vllm_http.AsyncLLM,
    settings: Settings,
    restarts: Restarts | None,
    peer: FrontEnd | Replica | None,
    remote: RemoteEngines | None,
) -> Admission:
    """What gives permits, by limits that other processes like this one share."""
    front_ends, engines, shared = 1, 1, None
    if remote is not None:
        front_ends, engines = remote.fronts, remote.most
    if isinstance(peer, FrontEnd):
        front_ends = peer.count
        shared = SharedUsages(peer.usage, usage_lock(peer.folder), peer.index, peer.count)
    elif peer is not None:
        lock = usage_lock(peer.folder)
        shared = SharedUsages(peer.usage_memory(), lock, peer.index, peer.count)
        shared.forget_mine()  # those of a replica that was killed
    return Admission(
        launch.admission_limits(engine, settings, front_ends, engines),
        EngineQueue(engine).why_full,
        shared,
        restarts.refusal if restarts is not None else lambda: None,
    )


def _peers(mine: FrontEnd, engine: vllm_http.AsyncLLM) -> Peers:
    peers = Peers(mine, vllm_http.get_prometheus_registry())
    peers.updated = several_clients.note_statistics(engine)
    return peers


def body_bounds(settings: HttpSettings) -> BodyBounds:
    """The bounds on JSON bodies by `settings`."""
    return BodyBounds(
        json_bytes=settings.max_request_json_bytes,
        values=settings.max_request_values,
        depth=settings.max_request_depth,
        items=settings.max_request_items,
    )


def _fetcher(args: Namespace, settings: Settings) -> Fetcher:
    """Raises CannotStart if an allowed host or network is invalid."""
    http = settings.http
    fetch = FetchSettings(
        timeout_s=http.fetch_timeout_s,
        max_bytes=settings.images.max_image_bytes,
        max_redirects=http.fetch_max_redirects,
        max_connections=http.fetch_connections,
        max_connections_per_host=http.fetch_connections_per_host,
        allow_private=http.allow_private_media,
        allowed=http.allowed_private_media,
        only_hosts=tuple(args.allowed_media_domains or ()),
    )
    cache_bytes = int(http.fetch_cache_gb * GIB)
    try:
        return Fetcher(fetch, cache=FetchCache(cache_bytes) if cache_bytes else None)
    except ValueError as error:
        raise CannotStart(str(error)) from None

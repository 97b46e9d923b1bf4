"""From arguments to a running server: starts the engine, the image pool and the media loader.

arguments -> prepared engine -> worker preload | engine start -> pool -> http.app -> http.server
"""

import asyncio
import contextlib
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from server.engine import launch, vllm_http
from server.engine.vllm_adapter import cpu_waits, plugin
from server.engine.vllm_adapter.encode_timing import EncodeTimes
from server.engine.vllm_adapter.engine_queue import EngineQueue
from server.engine.vllm_adapter.outcomes import Outcomes
from server.engine.vllm_adapter.send import Gate
from server.errors import CannotStart
from server.http import keys
from server.http import server as http_server
from server.http.app import (
    Parts,
    batch_runner,
    build_app,
    inner_client,
    model_name,
    observed,
)
from server.ingest.expand import Expander
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.fetch_cache import FetchCache
from server.ingest.files import FileStore, Quota
from server.ingest.load import MediaLoader
from server.request.admission import Admission
from server.request.bounds import BodyBounds
from server.request.read import RequestReader
from server.settings import GIB, HttpSettings, Settings
from server.telemetry import metrics, tracing
from server.workers.pool import ImagePool
from server.workers.process import keep_freed_memory, return_regularly

# Freed heap that is kept between requests: the size of a request body with a few photos.
_KEPT_HEAP_BYTES = 128 << 20
# Disk space for files in a folder that the operator chose, and in the default folder, in GiB.
_FILES_GB, _DEFAULT_FILES_GB = 10.0, 1.0
# Time limit for sending the last traces at shutdown.
_TRACES_TIMEOUT_S = 5.0

Report = Callable[[str], None]


async def run(args: Namespace, settings: Settings, report: Report) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    keep_freed_memory(_KEPT_HEAP_BYTES)
    plugin.ask(die_with_parent=True, return_memory=True, quick_start=True)
    keeps_responses = bool(vllm_http.paths_that_keep_bodies())
    key_ring = keys.key_ring(
        settings.access, vllm_http.api_keys(args), keeps_responses=keeps_responses
    )
    address, sock = vllm_http.setup_server(args, reuse_port=False)
    with sock:
        async with running(args, settings, report) as parts:
            app = await build_app(args, settings, parts, key_ring)
            outer = observed(app, args, settings)
            config = http_server.uvicorn_config(outer, args, settings)
            server = http_server.Server(config)
            app.state.server = server
            refresher = None
            if args.enable_ssl_refresh:
                refresher = vllm_http.refresh_certificates(config, args)
            server.on_started = lambda: report(_invitation(args, address, sock))
            try:
                client = inner_client(outer, args, settings, parts)
                runner = batch_runner(app, client, settings.batches, parts, key_ring)
                async with runner or contextlib.nullcontext():
                    app.state.batches = runner
                    delay_s = settings.http.drain_delay_s
                    return await http_server.serve(server, sock, parts.engine, app, delay_s)
            finally:
                if refresher is not None:
                    refresher.stop()
                if args.otlp_traces_endpoint is not None:
                    await asyncio.to_thread(tracing.close, _TRACES_TIMEOUT_S)


@contextlib.asynccontextmanager
async def running(args: Namespace, settings: Settings, report: Report) -> AsyncIterator[Parts]:
    """Start the engine, the image pool and the fetcher concurrently; stop them in reverse order."""
    report(f"reading the model {model_name(args)}")
    prepared = launch.prepare(args, settings)
    async with contextlib.AsyncExitStack() as stack:
        fetcher = await stack.enter_async_context(_fetcher(args, settings))
        store = await stack.enter_async_context(_file_store(settings, report))
        pool = None
        if prepared.workers is not None:
            share = settings.admission.max_group_share
            pool = ImagePool(prepared.workers, settings.images, cpu_waits.note_work, share)
            stack.callback(pool.stop_preload)
            pool.preload()
        report(f"starting the engine on {prepared.config.device_config.device_type}")
        embeddings = launch.add_embedding_cache(prepared, settings)
        if embeddings is not None:
            await stack.enter_async_context(embeddings)
            stack.enter_context(metrics.embedding_cache(embeddings.snapshots))
        outcomes, gate = Outcomes(), Gate()
        times = await stack.enter_async_context(EncodeTimes(outcomes.encoded))
        outcomes.read_reports = times.read
        engine, heartbeat = await stack.enter_async_context(
            launch.running(prepared, settings, outcomes, gate)
        )
        engine_caches = launch.caches_of(engine, embeddings, gate)
        if pool is not None:
            report(f"starting {settings.images.image_workers} image workers")
            await stack.enter_async_context(pool)
            report(f"image workers are confined by {pool.confinement}")
        return_regularly()
        limits = launch.media_limits(engine, settings)
        embeds = launch.accepted_embeddings(engine)
        engine_queue = EngineQueue(engine)
        admission = Admission(launch.admission_limits(engine, settings), engine_queue.why_full)
        reader = RequestReader(limits, embeds, body_bounds(settings.http))
        loader = None
        if pool is not None and limits is not None:
            expander = Expander(pool, limits)
            loader = MediaLoader(fetcher, limits, args.allowed_local_media_path, store, expander)
            clips = launch.clip_decoder(settings, pool.forkserver)
            stack.callback(clips.close)
            path = await launch.connect(engine, settings, pool, clips, embeddings)
            if not path.encoded:
                report("this model preprocesses its images in vLLM")
        yield Parts(
            engine=engine,
            heartbeat=heartbeat,
            caches=engine_caches,
            fetch_cache=fetcher.cache,
            pool=pool,
            reader=reader,
            loader=loader,
            files=store,
            admission=admission,
        )


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


@contextlib.asynccontextmanager
async def _file_store(settings: Settings, report: Report) -> AsyncIterator[FileStore | None]:
    """The store of uploaded files; None if it is off, or if the default folder cannot be used.

    Raises:
        CannotStart: the folder that was asked for cannot be used.
    """
    given = settings.files
    if not given.files:
        yield None
        return
    has_folder = given.files_dir is not None
    gib = given.files_gb or (_FILES_GB if has_folder else _DEFAULT_FILES_GB)
    group_bytes = None if given.files_group_gb is None else int(given.files_group_gb * GIB)
    store = None
    async with contextlib.AsyncExitStack() as stack:
        try:
            made = FileStore(
                given.files_dir or _cache_folder() / "saccade" / "files",
                Quota(int(gib * GIB), given.files_count),
                Quota(group_bytes, given.files_group_count),
                given.files_ttl_s,
            )
            store = await stack.enter_async_context(made)
        except CannotStart as error:
            if has_folder:
                raise
            report(f"the Files API is off: {error}")
        yield store


def _cache_folder() -> Path:
    """The user's folder for caches (XDG Base Directory Specification: a relative path is ignored).

    Raises:
        CannotStart: the user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return given if given.is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError:
        raise CannotStart("without a home folder, give it a folder with --files-dir") from None


def _invitation(args: Namespace, address: str, sock: socket.socket) -> str:
    if not args.uds:
        scheme, _, rest = address.partition("://")
        host = rest.rpartition(":")[0]
        reachable = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host  # noqa: S104 - shown
        address = f"{scheme}://{reachable}:{sock.getsockname()[1]}"
    name = model_name(args)
    return (
        f"ready: {name} on {address} - try: curl {address}/v1/chat/completions "
        "-H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )

"""From arguments to a running server: starts the engine, the image pool and the media loader.

arguments -> prepared engine -> worker preload | engine start -> pool -> http.app -> http.server
"""

import asyncio
import contextlib
import functools
import os
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

from starlette.types import ASGIApp

from server import shares
from server.concurrency import share_memory
from server.engine import launch, vllm_http
from server.engine.vllm_adapter import cpu_waits, plugin, several_clients
from server.engine.vllm_adapter.encode_timing import EncodeTimes
from server.engine.vllm_adapter.engine_queue import EngineQueue
from server.engine.vllm_adapter.outcomes import Outcomes
from server.engine.vllm_adapter.remote_core import RemoteEngines
from server.engine.vllm_adapter.send import Gate
from server.errors import CannotStart
from server.front_ends import FrontEnd, encoder_address, usage_lock
from server.http import keys
from server.http import server as http_server
from server.http.app import (
    Parts,
    batch_runner,
    build_app,
    byte_budget,
    inner_client,
    model_name,
    observed,
)
from server.http.peers import Peers
from server.ingest.expand import Expander
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.fetch_cache import FetchCache
from server.ingest.files import FileReader, FileStore, Quota
from server.ingest.load import MediaLoader
from server.ingest.reduce import Reducer
from server.replica import Replica
from server.request.admission import Admission
from server.request.bounds import BodyBounds
from server.request.grounding import of_model
from server.request.read import RequestReader
from server.request.shared_usage import SharedUsages
from server.settings import GIB, HttpSettings, Settings
from server.telemetry import metrics, tracing
from server.workers.pool import ImagePool
from server.workers.process import keep_freed_memory_in_one_heap, return_regularly

# Disk space for files in a folder that the operator chose, and in the default folder, in GiB.
_FILES_GB, _DEFAULT_FILES_GB = 10.0, 1.0
# A group may have this share of the image workers, whatever its share of the engine is: a worker is
# free again after some milliseconds.
_LEAST_WORKER_SHARE = 0.5
# Time limit for sending the last traces at shutdown.
_TRACES_TIMEOUT_S = 5.0

Report = Callable[[str], None]


async def run(
    args: Namespace, settings: Settings, report: Report, mine: FrontEnd | None = None
) -> int:
    """Serve until a signal or the engine's death; returns the exit status. `mine` is this process,
    if it is one of several front ends."""
    keep_freed_memory_in_one_heap()
    if mine is None:
        plugin.ask(die_with_parent=True, return_memory=True, quick_start=True)
    else:
        share_memory(mine.count)
        settings = shares.part_of(settings, mine)
    keeps_responses = bool(vllm_http.paths_that_keep_bodies())
    key_ring = keys.key_ring(
        settings.access, vllm_http.api_keys(args), keeps_responses=keeps_responses
    )
    if mine is None:
        address, sock = vllm_http.setup_server(args, reuse_port=False)
    else:
        vllm_http.join_server(args)
        address, sock = mine.engines.address, mine.listening
    with sock:
        async with running(args, settings, report, mine) as parts:
            app = await build_app(args, settings, parts, key_ring)
            outer = observed(app, args, settings)
            peers, whole, root_path = parts.peers, cast(ASGIApp, outer), args.root_path or ""
            passes_on: Callable[[str], bool] = lambda path: False  # noqa: E731
            if peers is not None:
                whole = peers.forwarding(outer, root_path)
                passes_on = functools.partial(peers.passes_on, root_path=root_path)
            config = http_server.uvicorn_config(
                whole, args, settings, parts.bodies, passes_on, outer.turns
            )
            server = http_server.Server(config, mine)
            app.state.server = server
            refresher = None
            if args.enable_ssl_refresh:
                refresher = vllm_http.refresh_certificates(config, args)

            def announce() -> None:
                is_only = Replica.current() is None
                report(_invitation(args, address, sock) if is_only else "ready")

            if mine is None:
                server.on_started = announce
            else:
                server.on_announced = announce
                server.on_started = functools.partial(_say_ready, mine)
            try:
                client = inner_client(outer, args, settings, parts)
                runner = batch_runner(app, client, settings.batches, parts, key_ring)
                async with contextlib.AsyncExitStack() as stack:
                    if runner is not None:
                        app.state.batches = await stack.enter_async_context(runner)
                    if peers is not None:
                        answering = peers.answering(outer, parts.caches, parts.fetch_cache, server)
                        await stack.enter_async_context(answering)
                    return await http_server.serve(
                        server,
                        sock,
                        parts.engine,
                        app,
                        settings.http.drain_delay_s,
                        mine.link if mine is not None else None,
                    )
            finally:
                if refresher is not None:
                    refresher.stop()
                outer.flush()
                if args.otlp_traces_endpoint is not None:
                    await asyncio.to_thread(tracing.close, _TRACES_TIMEOUT_S)


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
    async with contextlib.AsyncExitStack() as stack:
        fetcher = await stack.enter_async_context(_fetcher(args, settings))
        store: FileStore | None = None
        files: FileStore | FileReader | None
        peer = mine or Replica.current()
        if peer is None or peer.is_first:
            files = store = await stack.enter_async_context(_file_store(settings, report))
            if peer is not None:
                _tell_of_files(peer, store is not None)
        else:
            files = _files_of_first(settings, peer)
        pool = None
        if prepared.workers is not None:
            share = max(settings.admission.max_group_share, _LEAST_WORKER_SHARE)
            pool = ImagePool(prepared.workers, settings.images, cpu_waits.note_work, share)
            stack.callback(pool.stop_preload)
            pool.preload()
        if mine is None and remote is None:
            report(f"starting the engine on {prepared.config.device_config.device_type}")
        embeddings = None
        if remote is None:  # else it is theirs
            embeddings = launch.add_embedding_cache(prepared, settings, mine)
        if embeddings is not None:
            await stack.enter_async_context(embeddings)
            stack.enter_context(metrics.embedding_cache(embeddings.snapshots))
        outcomes, gate = Outcomes(), Gate()
        reports = encoder_address(mine.folder, mine.index) if mine is not None else None
        times = await stack.enter_async_context(EncodeTimes(outcomes.encoded, reports))
        outcomes.read_reports = times.read
        engine, heartbeat, restarts = await stack.enter_async_context(
            launch.running(prepared, settings, outcomes, gate, mine)
        )
        engine_caches = launch.caches_of(
            engine, embeddings, gate, is_only=mine is None and remote is None
        )
        if pool is not None:
            report(f"starting {settings.images.image_workers} image workers")
            await stack.enter_async_context(pool)
            report(f"image workers are confined by {pool.confinement}")
        return_regularly()
        limits = launch.media_limits(engine, settings)
        embeds = launch.accepted_embeddings(engine)
        engine_queue = EngineQueue(engine)
        front_ends, engines, shared = 1, 1, None
        if remote is not None:
            front_ends, engines = remote.fronts, remote.most
        if mine is not None:
            front_ends = mine.count
            lock = usage_lock(mine.folder)
            shared = SharedUsages(mine.usage, lock, mine.index, mine.count)
        elif isinstance(peer, Replica):
            lock = usage_lock(peer.folder)
            shared = SharedUsages(peer.usage_memory(), lock, peer.index, peer.count)
            shared.forget_mine()  # those of a replica that was killed
        admission = Admission(
            launch.admission_limits(engine, settings, front_ends, engines),
            engine_queue.why_full,
            shared,
            restarts.refusal if restarts is not None else lambda: None,
        )
        grounding = of_model(engine.model_config.hf_config.model_type)
        reader = RequestReader(limits, embeds, body_bounds(settings.http), grounding)
        loader = None
        if pool is not None and limits is not None:
            expander = Expander(pool, limits)
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
            reader=reader,
            loader=loader,
            files=store,
            admission=admission,
            bodies=byte_budget(settings.http),
            peers=_peers(mine, engine) if mine is not None else None,
            engines=remote.transport.count if remote is not None else None,
        )


def _peers(mine: FrontEnd, engine: vllm_http.AsyncLLM) -> Peers:
    peers = Peers(mine, vllm_http.get_prometheus_registry())
    peers.updated = several_clients.note_statistics(engine)
    return peers


def _say_ready(mine: FrontEnd) -> None:
    """Tell the supervisor, and what the engines have said, for the next one in this place."""
    hello = [(name.hex(), text.hex()) for name, text in several_clients.heard().items()]
    mine.link.send({"hello": hello})


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


def _tell_of_files(mine: FrontEnd | Replica, has_files: bool) -> None:
    marker = mine.files_marker()
    if has_files:
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def _files_of_first(settings: Settings, mine: FrontEnd | Replica) -> FileReader | None:
    """The files that the first front end has, if its folder can be used."""
    if not settings.files.files:
        return None
    try:
        return FileReader(_files_folder(settings), marker=mine.files_marker())
    except CannotStart:  # there is no folder
        return None


def _files_folder(settings: Settings) -> Path:
    return settings.files.files_dir or _cache_folder() / "saccade" / "files"


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
                _files_folder(settings),
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

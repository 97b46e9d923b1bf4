"""The only wiring: engine, image pool, app and HTTP server, from start to shutdown.

arguments -> engine plan -> worker preload | engine start -> pool -> app -> uvicorn
"""

import asyncio
import contextlib
import logging
import os
import platform
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from server import __version__, lifeline, notify
from server.engine import launch, vllm_http
from server.engine.vllm_adapter import cpu_waits
from server.engine.vllm_adapter.encode_timing import EncodeTimes
from server.engine.vllm_adapter.engine_caches import EngineCaches
from server.engine.vllm_adapter.outcomes import Outcomes
from server.errors import CannotStart
from server.http import (
    body,
    caches,
    chat,
    errors,
    files,
    forms,
    health,
    images,
    keys,
    messages,
    observe,
    usage,
)
from server.ingest.expand import Expander
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.fetch_cache import FetchCache
from server.ingest.files import FileStore, Quota
from server.ingest.load import MediaLoader
from server.request.context import RetainedMedia
from server.request.read import RequestReader
from server.settings import GIB, Settings
from server.telemetry import metrics, tracing
from server.workers.heap import keep_freed_memory
from server.workers.pool import ImagePool

log = logging.getLogger("saccade")

# Request bodies of a few photos: heap that is worth keeping between requests.
_KEPT_HEAP_BYTES = 128 << 20
_ENGINE_CHECK_INTERVAL_S = 1.0
# How long the last traces may take to be sent.
_TRACES_TIMEOUT_S = 5.0

Report = Callable[[str], None]


async def run(args: Namespace, settings: Settings, report: Report) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    keep_freed_memory(_KEPT_HEAP_BYTES)
    lifeline.ask()
    keeps_responses = bool(vllm_http.paths_that_keep_bodies())
    key_ring = keys.key_ring(
        settings.access, vllm_http.api_keys(args), keeps_responses=keeps_responses
    )
    address, sock = vllm_http.setup_server(args, reuse_port=False)
    with sock:
        async with _running(args, settings, report) as parts:
            app = await build_app(args, settings, parts, key_ring)
            config = _uvicorn_config(_observed(app, args, settings), args, settings)
            server = _Server(config)
            app.state.server = server
            refresher = None
            if args.enable_ssl_refresh:
                refresher = vllm_http.refresh_certificates(config, args)
            server.on_started = lambda: _tell(report, _invitation(args, address, sock))
            try:
                return await _serve(server, sock, parts.engine, app)
            finally:
                if refresher is not None:
                    refresher.stop()
                if args.otlp_traces_endpoint is not None:
                    await asyncio.to_thread(tracing.close, _TRACES_TIMEOUT_S)


@dataclass(frozen=True)
class _Parts:
    """What runs behind the app. `pool` and `loader` are None where the model takes no media."""

    engine: vllm_http.AsyncLLM
    caches: EngineCaches
    fetch_cache: FetchCache | None
    pool: ImagePool | None
    reader: RequestReader
    loader: MediaLoader | None


@contextlib.asynccontextmanager
async def _running(args: Namespace, settings: Settings, report: Report) -> AsyncIterator[_Parts]:
    """Engine, image pool and fetcher, started side by side and stopped in reverse."""
    report(f"reading the model {_model_name(args)}")
    plan = launch.plan(args, settings)
    async with contextlib.AsyncExitStack() as stack:
        fetcher = await stack.enter_async_context(_fetcher(args, settings))
        store = _file_store(settings)
        if store is not None:
            await stack.enter_async_context(store)
        pool = None
        if plan.workers is not None:
            pool = ImagePool(plan.workers, settings.images, cpu_waits.note_work)
            stack.callback(pool.stop_preload)
            pool.preload()
        report(f"starting the engine on {plan.config.device_config.device_type}")
        embeddings = launch.add_embedding_cache(plan, settings)
        if embeddings is not None:
            await stack.enter_async_context(embeddings)
            stack.enter_context(metrics.embedding_cache(embeddings.snapshots))
        outcomes = Outcomes()
        await stack.enter_async_context(EncodeTimes(outcomes.encoded))
        engine = await stack.enter_async_context(launch.running(plan, outcomes))
        engine_caches = launch.caches_of(engine, embeddings)
        if pool is not None:
            report(f"starting {settings.images.image_workers} image workers")
            await stack.enter_async_context(pool)
        limits = launch.media_limits(engine, settings)
        embeds = launch.accepted_embeddings(engine)
        reader = RequestReader(limits, embeds, settings.http.max_request_json_bytes)
        if pool is None or limits is None:
            yield _Parts(engine, engine_caches, fetcher.cache, pool, reader, None)
            return
        expander = Expander(pool, limits)
        loader = MediaLoader(fetcher, limits, args.allowed_local_media_path, store, expander)
        path = await launch.connect(engine, settings, pool, embeddings)
        if not path.encoded:
            report("this model preprocesses its images in vLLM")
        yield _Parts(engine, engine_caches, fetcher.cache, pool, reader, loader)


def _fetcher(args: Namespace, settings: Settings) -> Fetcher:
    """Raises CannotStart if a host or network that is allowed is none."""
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


def _file_store(settings: Settings) -> FileStore | None:
    given = settings.files
    if given.files_dir is None:
        return None
    group_bytes = None if given.files_group_gb is None else int(given.files_group_gb * GIB)
    return FileStore(
        given.files_dir,
        Quota(int(given.files_gb * GIB), given.files_count),
        Quota(group_bytes, given.files_group_count),
        given.files_ttl_s,
    )


async def build_app(
    args: Namespace, settings: Settings, parts: _Parts, key_ring: keys.KeyRing
) -> FastAPI:
    """The FastAPI app: our routes first, then vLLM's, then what every request passes.

    Middleware that is added later lies further out: a request meets the error shape, vLLM's
    middleware (keys, CORS), the keys in groups, the body reader, and then its route, whose answer
    meets the usage.
    """
    engine = parts.engine
    docs = not args.disable_fastapi_docs
    app = FastAPI(
        title="Saccade",
        lifespan=vllm_http.lifespan,
        openapi_url="/openapi.json" if docs else None,
        docs_url=None if args.enable_offline_docs else "/docs",
        redoc_url=None if args.enable_offline_docs else "/redoc",
    )
    app.root_path = args.root_path
    app.state.args = args
    app.state.image_pool = parts.pool
    app.state.loader = parts.loader
    app.state.engine_caches = parts.caches
    app.state.fetch_cache = parts.fetch_cache
    app.state.key_ring = key_ring
    app.state.draining = False
    routers = [health.router, chat.router, messages.router, caches.router]
    if parts.loader is not None:
        routers += [images.router, files.router]
    for router in routers:
        app.include_router(router)
    ours = {route.path for router in routers for route in router.routes}  # type: ignore[attr-defined]
    mine = list(app.router.routes)
    await vllm_http.add_vllm_routes(app, args, engine)
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if route in mine or getattr(route, "path", None) not in ours
    ]
    errors.add_error_handler(app)
    if parts.loader is not None:  # else there are no images
        app.add_middleware(usage.ImageUsage)
    stored = vllm_http.paths_that_keep_bodies()
    app.add_middleware(
        body.BodyReader,
        settings=settings.http,
        reader=parts.reader,
        loader=parts.loader,
        retained=RetainedMedia(int(settings.http.retained_media_gb * GIB)) if stored else None,
        limits={files.PATH: settings.images.max_image_bytes + forms.MAX_OVERHEAD_BYTES},
    )
    if key_ring.has_groups:
        app.add_middleware(keys.ApiKeys, ring=key_ring, guarded=vllm_http.GUARDED_PREFIX)
    checked = keys.keys_for_vllm(settings.access, vllm_http.api_keys(args))
    await vllm_http.add_vllm_middleware(app, args, engine, checked)
    app.add_middleware(errors.OpenAIErrors)
    return app


def _observed(app: FastAPI, args: Namespace, settings: Settings) -> observe.Observed:
    """`app` with records around it, and what the metrics tell of the server as a whole."""
    parallel = app.state.vllm_config.parallel_config
    metrics.devices.set(parallel.world_size * parallel.data_parallel_size)
    metrics.ready.set_function(lambda: float(health.problem(app.state) is None))
    metrics.build.info(
        {
            "version": __version__,
            "vllm": vllm_http.vllm_version,
            "python": platform.python_version(),
            "device": app.state.vllm_config.device_config.device_type,
            "model": _model_name(args),
        }
    )
    return observe.Observed(
        app,
        root_path=args.root_path or "",
        routes=[path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))],
        server_timing=settings.observability.server_timing,
        log_requests=settings.observability.log_format == "json",
        unlogged=map(str.strip, (args.disable_access_log_for_endpoints or "").split(",")),
        traced=args.otlp_traces_endpoint is not None,
    )


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process under our feet."""

    on_started: Callable[[], None] = staticmethod(lambda: None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()


def _uvicorn_config(app: observe.Observed, args: Namespace, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",
        log_config=vllm_http.get_uvicorn_log_config(args) or uvicorn.config.LOGGING_CONFIG,
        log_level=args.uvicorn_log_level,
        access_log=not (
            args.disable_uvicorn_access_log or settings.observability.log_format == "json"
        ),
        timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5")),
        timeout_graceful_shutdown=args.shutdown_timeout or settings.http.drain_timeout_s,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers or "TLSv1",
    )


async def _serve(
    server: _Server, sock: socket.socket, engine: vllm_http.AsyncLLM, app: FastAPI
) -> int:
    """Serve until a signal; the first one drains, a second one does not wait."""

    def stop() -> None:
        if app.state.draining:
            server.force_exit = True
        app.state.draining = True
        notify.stopping()
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    watch = asyncio.create_task(_watch(server, engine))
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
    return 1 if engine.errored else 0


async def _watch(server: _Server, engine: vllm_http.AsyncLLM) -> None:
    """A dead engine cannot come back: stop, so that whoever supervises us starts us anew."""
    if vllm_http.stays_up_without_engine():
        return
    while not engine.errored:  # noqa: ASYNC110 - the engine offers nothing to wait for
        await asyncio.sleep(_ENGINE_CHECK_INTERVAL_S)
    log.error("the engine has died; stopping")
    server.should_exit = True


def _tell(report: Report, invitation: str) -> None:
    report(invitation)
    notify.ready()


def _invitation(args: Namespace, address: str, sock: socket.socket) -> str:
    if not args.uds:
        scheme, _, rest = address.partition("://")
        host = rest.rpartition(":")[0]
        reachable = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host  # noqa: S104
        address = f"{scheme}://{reachable}:{sock.getsockname()[1]}"
    name = _model_name(args)
    return (
        f"ready: {name} on {address} - try: curl {address}/v1/chat/completions "
        "-H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )


def _model_name(args: Namespace) -> str:
    """The first name under which clients know the model."""
    names: list[str] = args.served_model_name or [args.model]
    return names[0]

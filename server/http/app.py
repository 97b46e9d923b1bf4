"""Assembles the app: routes, and the layers around them.

observe -> vLLM's middleware (CORS, its check of keys) -> keys -> body -> usage -> routes
"""

import platform
from argparse import Namespace
from dataclasses import dataclass

from fastapi import FastAPI

from server import __version__
from server.engine import vllm_http
from server.engine.vllm_adapter.engine_caches import EngineCaches
from server.http import (
    body,
    errors,
    files,
    images,
    keys,
    observe,
    routes,
    usage,
)
from server.ingest.fetch_cache import FetchCache
from server.ingest.load import MediaLoader
from server.request.context import RetainedMedia
from server.request.read import RequestReader
from server.settings import GIB, Settings
from server.telemetry import metrics
from server.workers.pool import ImagePool

# Routes whose work is cancelled when the client leaves.
_ABORTED = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/images/tokens",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/tokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v2/embed",
    "/v2/rerank",
)


@dataclass(frozen=True)
class Parts:
    """The services behind the app. `pool` and `loader` are None if the model takes no media."""

    engine: vllm_http.AsyncLLM
    caches: EngineCaches
    fetch_cache: FetchCache | None
    pool: ImagePool | None
    reader: RequestReader
    loader: MediaLoader | None


async def build_app(
    args: Namespace, settings: Settings, parts: Parts, key_ring: keys.KeyRing
) -> FastAPI:
    """Build the FastAPI app: our routes first, then vLLM's, then the middleware.

    Middleware that is added later wraps what was added before: a request passes vLLM's middleware
    (keys, CORS), the groups of keys, the body reader, the usage, and then its route.
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
    routers = [routes.status, routes.conversations, routes.caches]
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
    errors.add_error_handlers(app)
    if parts.loader is not None:  # else there are no images
        app.add_middleware(usage.ImageUsage)
    stored = vllm_http.paths_that_keep_bodies()
    app.add_middleware(
        body.BodyReader,
        settings=settings.http,
        reader=parts.reader,
        loader=parts.loader,
        retained=RetainedMedia(int(settings.http.retained_media_gb * GIB)) if stored else None,
        limits={files.PATH: settings.images.max_image_bytes + files.MAX_OVERHEAD_BYTES},
    )
    if key_ring.has_groups:
        app.add_middleware(keys.ApiKeys, ring=key_ring, guarded=vllm_http.GUARDED_PREFIX)
    checked = keys.keys_for_vllm(settings.access, vllm_http.api_keys(args))
    await vllm_http.add_vllm_middleware(app, args, engine, checked)
    return app


def observed(app: FastAPI, args: Namespace, settings: Settings) -> observe.Observed:
    """Wrap `app` with records of its requests, and set the metrics of the server as a whole."""
    parallel = app.state.vllm_config.parallel_config
    metrics.devices.set(parallel.world_size * parallel.data_parallel_size)
    metrics.ready.set_function(lambda: float(routes.unreadiness(app.state) is None))
    metrics.build.info(
        {
            "version": __version__,
            "vllm": vllm_http.vllm_version,
            "python": platform.python_version(),
            "device": app.state.vllm_config.device_config.device_type,
            "model": model_name(args),
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
        aborted=_ABORTED,
    )


def model_name(args: Namespace) -> str:
    """The first name of the model for clients."""
    names: list[str] = args.served_model_name or [args.model]
    return names[0]

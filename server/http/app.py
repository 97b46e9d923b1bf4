"""Assembles the app: routes, and the layers around them.

observe -> single headers -> vLLM's middleware (CORS, its check of keys) -> keys -> body -> routes
"""

import asyncio
import platform
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import Route

from server import __version__
from server.batches.lines import LineLimits
from server.batches.record import Batch
from server.batches.runner import BatchRunner
from server.batches.store import BatchStore
from server.concurrency import usable_memory
from server.engine import vllm_http
from server.engine.heartbeat import Heartbeat
from server.engine.restarts import Restarts
from server.engine.vllm_adapter.engine_caches import EngineCaches
from server.http import (
    batches,
    body,
    describe,
    errors,
    files,
    headers,
    http_metrics,
    images,
    keys,
    metrics_pages,
    observe,
    pages,
    routes,
)
from server.http.byte_budget import ByteBudget
from server.http.fail_fast import stop_at_first_error
from server.http.peers import Peers
from server.ingest.fetch_cache import FetchCache
from server.ingest.files import FileStore
from server.ingest.load import MediaLoader
from server.request.admission import Admission
from server.request.context import RetainedMedia
from server.request.read import RequestReader
from server.settings import GIB, BatchSettings, HttpSettings, Settings
from server.telemetry import metrics
from server.workers.pool import ImagePool

_BODIES_SHARE_OF_MEMORY = 1 / 8

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

# Routes whose requests need a permit: all that do work for a client.
ADMITTED = (
    *_ABORTED,
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/systemone",
)

# Modules of middleware that looks at most at the start of a streamed answer. Middleware of users
# (`--middleware`) and of plugins, and vLLM's log of answers, may read or change all of it.
_LOOK_AT_STARTS = frozenset(
    {
        body.__name__,
        headers.__name__,
        http_metrics.__name__,
        keys.__name__,
        "starlette.middleware.cors",
        "vllm.entrypoints.serve.elastic_ep.middleware",
        "vllm.entrypoints.serve.middleware.authenticate",
        "vllm.entrypoints.serve.middleware.x_request_id",
        "vllm.entrypoints.speech_to_text.realtime.metrics",
    }
)


@dataclass(frozen=True)
class Parts:
    """The services behind the app. `restarts` is None if a dead engine ends the server, `pool` and
    `loader` if the model takes no media, `files` if the Files API is off or another front end has
    them, `peers` if this is the only front end. `engines` tells how many there are, if other
    processes have started them."""

    engine: vllm_http.AsyncLLM
    heartbeat: Heartbeat
    restarts: Restarts | None
    caches: EngineCaches
    fetch_cache: FetchCache | None
    pool: ImagePool | None
    reader: RequestReader
    loader: MediaLoader | None
    files: FileStore | None
    admission: Admission
    bodies: ByteBudget
    peers: Peers | None = None
    engines: Callable[[], int] | None = None


async def build_app(
    args: Namespace, settings: Settings, parts: Parts, key_ring: keys.KeyRing
) -> FastAPI:
    """Build the FastAPI app: our routes first, then vLLM's, then the middleware."""
    docs = not args.disable_fastapi_docs
    app = FastAPI(
        title="Saccade",
        lifespan=vllm_http.lifespan,
        openapi_url="/openapi.json" if docs else None,
        docs_url=None,  # they would load files from another server
        redoc_url=None,
    )
    app.root_path = args.root_path or ""
    app.state.args = args
    app.state.image_pool = parts.pool
    app.state.loader = parts.loader
    app.state.files = parts.files
    app.state.max_batch_bytes = settings.batches.batch_bytes
    app.state.batches = None
    app.state.heartbeat = parts.heartbeat
    app.state.restarts = parts.restarts
    app.state.engine_caches = parts.caches
    app.state.fetch_cache = parts.fetch_cache
    app.state.peers = parts.peers
    app.state.engines = parts.engines
    app.state.key_ring = key_ring
    app.state.draining = False
    routers = [routes.status, routes.conversations, routes.caches, files.router, batches.router]
    if parts.loader is not None:
        routers.append(images.router)
    for router in routers:
        app.include_router(router)
    app.router.routes += metrics_pages.routes(
        vllm_http.get_prometheus_registry(),
        parts.peers.whole_registry if parts.peers is not None else None,
    )
    if docs and (swagger_ui := vllm_http.swagger_ui()) is not None:
        app.router.routes += pages.docs(swagger_ui)
    if settings.pages.playground:
        app.router.routes += pages.playground()
    ours = {route.path for router in routers for route in router.routes}  # type: ignore[attr-defined]
    ours.add(metrics_pages.PATH)
    mine = list(app.router.routes)
    await vllm_http.add_vllm_routes(app, args, parts.engine)
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if route in mine or getattr(route, "path", None) not in ours
    ]
    routes.take_documents(app)
    stop_at_first_error(app.routes)
    keep_schema(app, model_name(args))
    http_metrics.replace_instrumentator(app)
    errors.add_error_handlers(app)
    app.add_exception_handler(vllm_http.EngineDeadError, errors.answer_dead_engine)
    await _add_middleware(app, args, settings, parts, key_ring)
    return app


def keep_schema(app: FastAPI, model: str) -> None:
    """Replace FastAPI's route of the description, which it writes anew for each request. Its
    examples name the `model`."""
    for place, route in enumerate(app.router.routes):
        if isinstance(route, Route) and route.path == app.openapi_url:
            schema = _Schema(app, model)
            app.router.routes[place] = Route(route.path, schema.answer, include_in_schema=False)


class _Schema:
    """The description of the routes. It is made once, in a thread: anyone may ask for it, and each
    time would take milliseconds of the event loop, and the first one a good part of a second."""

    def __init__(self, app: FastAPI, model: str) -> None:
        self._app = app
        self._model = model
        self._making = asyncio.Lock()
        self._body: bytes | None = None

    async def answer(self, _: Request) -> Response:
        if self._body is None:
            async with self._making:
                self._body = self._body or await asyncio.to_thread(self._written)
        return Response(self._body, media_type="application/json")

    def _written(self) -> bytes:
        schema = self._app.openapi()
        describe.describe(schema, self._model)
        servers = schema.get("servers", [])
        root_path = self._app.root_path.rstrip("/")
        if root_path and all(server.get("url") != root_path for server in servers):
            schema = {**schema, "servers": [{"url": root_path}, *servers]}
        return bytes(JSONResponse(schema).body)


async def _add_middleware(
    app: FastAPI, args: Namespace, settings: Settings, parts: Parts, key_ring: keys.KeyRing
) -> None:
    """Add the layers around the routes. One that is added later wraps those before: a request
    passes vLLM's (keys, CORS), the groups of keys, the body reader, and then its route."""
    stored = vllm_http.paths_that_keep_bodies()
    app.add_middleware(
        body.BodyReader,
        settings=settings.http,
        reader=parts.reader,
        loader=parts.loader,
        retained=RetainedMedia(int(settings.http.retained_media_gb * GIB)) if stored else None,
        budget=parts.bodies,
        limits={
            files.PATH: max(settings.images.max_image_bytes, settings.batches.batch_bytes)
            + files.MAX_OVERHEAD_BYTES
        },
        parsed=[route.path for route in app.routes if isinstance(route, routes.ParsedRoute)],
        admission=parts.admission,
        admitted=ADMITTED,
    )
    guard_all = settings.access.keys_for_all_routes
    if key_ring.has_groups or guard_all:
        app.add_middleware(
            keys.ApiKeys,
            ring=key_ring,
            guarded=("",) if guard_all else vllm_http.GUARDED_PREFIX,
            priority_header=vllm_http.priority_header(parts.engine),
            reserved=vllm_http.ADMIN_PATHS if key_ring.has_groups else (),
            files=files.PATH,
        )
    checked = keys.keys_for_vllm(settings.access, vllm_http.api_keys(args))
    await vllm_http.add_vllm_middleware(app, args, parts.engine, checked)
    app.add_middleware(headers.SingleHeaders)


def byte_budget(settings: HttpSettings) -> ByteBudget:
    """The memory for bodies by `settings`, with the default for this machine."""
    if settings.request_memory_gb is None:
        total = int(usable_memory() * _BODIES_SHARE_OF_MEMORY)
    else:
        total = int(settings.request_memory_gb * GIB)
    return ByteBudget(max(total, settings.max_request_bytes), settings.request_memory_wait_s)


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
        request_timeout_s=settings.admission.request_timeout_s,
        streams_directly=all(
            middleware.cls.__module__ in _LOOK_AT_STARTS for middleware in app.user_middleware
        ),
    )


def inner_client(
    outer: observe.Observed, args: Namespace, settings: Settings, parts: Parts
) -> batches.InnerClient:
    """The client by which the requests of batches pass the whole app."""
    checked = keys.keys_for_vllm(settings.access, vllm_http.api_keys(args))
    return batches.InnerClient(
        outer, next(iter(checked), None), vllm_http.priority_header(parts.engine)
    )


def batch_runner(
    app: FastAPI,
    client: batches.InnerClient,
    settings: BatchSettings,
    parts: Parts,
    key_ring: keys.KeyRing,
) -> BatchRunner | None:
    """What works on the batches of the server; None if the Files API is off."""
    if parts.files is None:
        return None

    def asking_for(batch: Batch) -> batches.GroupAsking:
        return batches.GroupAsking(client, parts.admission, key_ring, app.state, batch.group)

    return BatchRunner(
        BatchStore(parts.files, settings.batch_group_count, settings.batch_group_items),
        asking_for,
        batches.ENDPOINTS & served_paths(app),
        LineLimits(settings.batch_items, settings.batch_line_bytes),
    )


def served_paths(app: FastAPI) -> frozenset[str]:
    """The paths of the routes that the model can answer."""
    paths = {getattr(route, "path", "") for route in app.routes}
    if app.state.openai_serving_chat is None:
        paths.discard("/v1/chat/completions")
    return frozenset(paths)


def model_name(args: Namespace) -> str:
    """The first name of the model for clients."""
    names: list[str] = args.served_model_name or [args.model]
    return names[0]

"""Liveness, readiness and version."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server import __version__
from server.engine.serving import EngineDeadError, vllm_version
from server.errors import error_body

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine is alive, 503 when it has died. Cheap: for liveness probes."""
    try:
        await request.app.state.engine_client.check_health()
    except EngineDeadError:
        return _unavailable("the engine has died")
    return Response(status_code=200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests can be served: engine up, image workers up, not shutting down."""
    state = request.app.state
    if state.draining:
        return _unavailable("the server is shutting down")
    if state.engine_client.errored:
        return _unavailable("the engine has died")
    if state.image_pool is not None and not state.image_pool.ready:
        return _unavailable("no image worker can take work")
    return Response(status_code=200)


@router.get("/version")
async def version() -> dict[str, str]:
    """`version` is vLLM's, as in vLLM; `saccade` is ours."""
    return {"version": vllm_version, "saccade": __version__}


def _unavailable(message: str) -> JSONResponse:
    return JSONResponse(error_body(message, "server_error", "unavailable"), status_code=503)

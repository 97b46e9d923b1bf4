"""Liveness, readiness and version."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import State

from server import __version__
from server.engine.vllm_http import EngineDeadError, vllm_version
from server.errors import Unavailable, error_body

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
    found = problem(request.app.state)
    return Response(status_code=200) if found is None else _unavailable(found)


def problem(state: State) -> str | None:
    """Why requests cannot be served now; None if they can."""
    if state.draining:
        return "the server is shutting down"
    if state.engine_client.errored:
        return "the engine has died"
    if state.image_pool is not None and not state.image_pool.ready:
        return "no image worker can take work"
    return None


@router.get("/version")
async def version() -> dict[str, str]:
    """`version` is vLLM's, as in vLLM; `saccade` is ours."""
    return {"version": vllm_version, "saccade": __version__}


def _unavailable(message: str) -> JSONResponse:
    body = error_body(message, Unavailable.type, Unavailable.code)
    return JSONResponse(body, status_code=Unavailable.status)

"""`/v1/cache`, for admins: what each cache holds and how often it helped, and emptying them."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from server.engine.vllm_adapter.engine_caches import EngineCaches
from server.http.keys import require_admin
from server.ingest.fetch_cache import FetchCache

router = APIRouter(prefix="/v1/cache", dependencies=[Depends(require_admin)])


@router.get("")
async def show_caches(raw_request: Request) -> dict[str, Any]:
    """Entries, bytes, hits and misses of each cache, and the tiers of the embedding cache."""
    caches: EngineCaches = raw_request.app.state.engine_caches
    fetched: FetchCache | None = raw_request.app.state.fetch_cache
    found = await caches.report()
    if fetched is not None:
        found["urls"] = fetched.stats()
    return {"object": "cache", **found}


@router.delete("")
async def clear_caches(raw_request: Request) -> dict[str, Any]:
    """Forget all images. `cleared` names what is empty now, without what running requests use."""
    caches: EngineCaches = raw_request.app.state.engine_caches
    fetched: FetchCache | None = raw_request.app.state.fetch_cache
    cleared = await caches.clear()
    if fetched is not None:
        fetched.clear()
        cleared.append("urls")
    return {"object": "cache.cleared", "cleared": cleared}

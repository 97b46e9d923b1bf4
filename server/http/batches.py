"""OpenAI's `/v1/batches`, and how their requests pass the app: as those of clients do, without a
connection."""

import asyncio
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Scope

from server.batches.items import Answer
from server.batches.lines import Item
from server.batches.runner import BatchRunner
from server.errors import ClientError, UnknownBatch, UnknownFile
from server.http.files import MAX_LIFETIME_S, MIN_LIFETIME_S
from server.http.keys import KeyRing
from server.http.scope import BatchItem, group_of, set_item
from server.ingest.files import files_disabled
from server.request.admission import Admission, Turn

PATH = "/v1/batches"
# What batches may ask, as far as the model has these routes.
ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"}
)
# Below all priorities that keys may have: vLLM serves the lowest number first.
_PRIORITY = 10**6 + 1
_WINDOW = re.compile(r"([1-9][0-9]{0,2})([hd])")
_MAX_WINDOW_S = 7 * 24 * 3600
_MAX_LISTED = 100
_READY_CHECK_S = 1.0

router = APIRouter()


class ExpiresAfter(BaseModel):
    """When the results of a batch expire."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S)


_Text = Annotated[str, Field(max_length=512)]
_Key = Annotated[str, Field(max_length=64)]


class CreateBatch(BaseModel):
    """OpenAI's request for a new batch."""

    input_file_id: _Text
    endpoint: _Text
    completion_window: _Text
    metadata: Annotated[dict[_Key, _Text], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


@router.post(PATH)
async def create_batch(request: CreateBatch, raw_request: Request) -> JSONResponse:
    """Answer the requests in an uploaded file in the background, within `completion_window`: `24h`,
    or another time of up to `7d`."""
    runner, group = _runner(raw_request), group_of(raw_request.scope)
    if request.endpoint not in runner.endpoints:
        known = ", ".join(sorted(runner.endpoints))
        raise ClientError(f"endpoint must be one of {known}", param="endpoint")
    window_s, after = _window_s(request.completion_window), request.output_expires_after
    try:
        file = runner.store.files.get(group, request.input_file_id)
    except UnknownFile as error:
        error.param = "input_file_id"
        raise
    if file.purpose != "batch":
        raise ClientError("the file must have the purpose 'batch'", param="input_file_id")
    batch = await runner.submit(
        group,
        file.id,
        window_s,
        endpoint=request.endpoint,
        completion_window=request.completion_window,
        metadata=request.metadata,
        output_lifetime_s=after.seconds if after is not None else None,
    )
    return JSONResponse(batch.shown())


@router.get(PATH)
async def list_batches(
    raw_request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 20,
) -> JSONResponse:
    """List the batches of the caller's group, the newest first; `after` is the last id of the
    previous page."""
    try:
        found, has_more = _runner(raw_request).store.listed(
            group_of(raw_request.scope), after, limit
        )
    except UnknownBatch as error:
        error.param = "after"
        raise
    return JSONResponse(
        {
            "object": "list",
            "data": [batch.shown() for batch in found],
            "first_id": found[0].id if found else None,
            "last_id": found[-1].id if found else None,
            "has_more": has_more,
        }
    )


@router.get(PATH + "/{batch_id}")
async def retrieve_batch(batch_id: str, raw_request: Request) -> JSONResponse:
    """Return a batch: its status, its counts, and the ids of its results when it is over."""
    store = _runner(raw_request).store
    return JSONResponse(store.get(group_of(raw_request.scope), batch_id).shown())


@router.post(PATH + "/{batch_id}/cancel")
async def cancel_batch(batch_id: str, raw_request: Request) -> JSONResponse:
    """Stop a batch. What was answered until then is in its output file."""
    runner = _runner(raw_request)
    batch = runner.store.get(group_of(raw_request.scope), batch_id)
    return JSONResponse((await runner.cancel(batch)).shown())


def _runner(raw_request: Request) -> BatchRunner:
    """Raises FilesDisabled."""
    runner: BatchRunner | None = raw_request.app.state.batches
    if runner is None:
        raise files_disabled()
    return runner


def _window_s(given: str) -> int:
    found = _WINDOW.fullmatch(given)
    seconds = int(found[1]) * (3600 if found[2] == "h" else 24 * 3600) if found else 0
    if not 0 < seconds <= _MAX_WINDOW_S:
        raise ClientError(
            "completion_window must be '24h', or another time from '1h' to '7d'",
            param="completion_window",
        )
    return seconds


# ---------------------------------------------------------------------- the requests of batches


class InnerClient:
    """Sends the requests of batches through `app`, the whole one with all its layers."""

    def __init__(self, app: ASGIApp, api_key: str | None, priority_header: bytes | None) -> None:
        """`api_key` is one that vLLM's own check accepts, if it checks keys. `priority_header` is
        as in `ApiKeys`."""
        self._app = app
        self._headers = [(b"content-type", b"application/json"), (b"host", b"batch")]
        if api_key is not None:
            self._headers.append((b"authorization", b"Bearer " + api_key.encode()))
        if priority_header is not None:
            self._headers.append((priority_header, str(_PRIORITY).encode()))

    async def ask(self, item: Item, request_id: str, group: str, turn: Turn) -> Answer:
        """Answer a request of `group`, whose body is taken. If it is cancelled, so is its work."""
        scope = self._scope(item, request_id, BatchItem(group, turn))
        answering = _Answering(item.take_body())
        await self._app(scope, answering.receive, answering.send)
        return answering.answer()

    def _scope(self, item: Item, request_id: str, mark: BatchItem) -> Scope:
        own = [
            (b"content-length", str(len(item.body)).encode()),
            (b"x-request-id", request_id.encode()),
        ]
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": item.url,
            "raw_path": item.url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [*self._headers, *own],
            "client": None,
            "server": None,
            "state": {},
        }
        set_item(scope, mark)
        return scope


class _Answering:
    """The client's side of one request: gives the body, and collects the answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 500
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []

    async def receive(self) -> Message:
        """The body, and then nothing: this client does not leave."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.lower(): value for name, value in message["headers"]}
        else:
            self._pieces.append(message.get("body", b""))

    def answer(self) -> Answer:
        after = self._headers.get(b"retry-after", b"")
        return Answer(
            self._status, b"".join(self._pieces), float(after) if after.isdigit() else 0.0
        )


class GroupAsking:
    """Asks for one batch, with the rights and the limits of its group."""

    def __init__(
        self, client: InnerClient, admission: Admission, ring: KeyRing, state: Any, group: str
    ) -> None:
        """`state` is that of the app: no request begins while it drains, or while its files have
        no room for results."""
        self._client = client
        self._admission = admission
        self._ring = ring
        self._state = state
        self._group = group

    async def turn(self) -> Turn:
        """Wait until the next request may run."""
        while not await self._may_begin():  # noqa: ASYNC110 - the keys file may change
            await asyncio.sleep(_READY_CHECK_S)
        return await self._admission.background_turn(self._group, self._ring.quotas_of(self._group))

    async def _may_begin(self) -> bool:
        if self._state.draining or not self._state.files.has_room(self._group):
            return False
        return await self._ring.knows(self._group)

    async def ask(self, item: Item, request_id: str, turn: Any) -> Answer:
        """Answer a request."""
        return await self._client.ask(item, request_id, self._group, turn)

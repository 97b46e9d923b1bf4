"""The routes of conversations, on vLLM's serving classes, and the routes about the server.

vLLM's own routes wait for the client to leave in additional tasks, two for a stream; here the
outermost layer cancels the task of the request (`http/client.py`). vLLM's route for messages turns
every error that is raised below it into a 500.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import State

from server import __version__
from server.engine import restarts
from server.engine.vllm_adapter.engine_caches import EngineCaches
from server.engine.vllm_adapter.text_stream import TextStream
from server.engine.vllm_http import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicServingMessages,
    ChatCompletionRequest,
    EngineDeadError,
    ErrorResponse,
    OpenAIServingChat,
    OpenAIServingResponses,
    ResponsesRequest,
    ResponsesResponse,
    metrics_header,
    validate_json_request,
    vllm_version,
    with_sse_keep_alive,
)
from server.errors import Unavailable, error_body
from server.http import usage
from server.http.errors import OF_VALIDATORS, unfit
from server.http.keys import require_admin
from server.http.peers import Peers
from server.http.scope import context_of, document_of
from server.http.stream import EventStream, TextEvents
from server.ingest.fetch_cache import FetchCache
from server.request.context import RequestContext

_RENDER_RESPONSES = "/v1/responses/render"
# Items of a response's input that are validated at a time. One takes up to 0.1 ms, since pydantic
# tries some thirty forms.
_ITEMS_AT_A_TIME = 64
# The caches that each of several front ends has; all engines' others are the same for all.
_OF_FRONT_ENDS = frozenset({"features", "urls"})


class ParsedRoute(APIRoute):
    """A route `endpoint(request: Model, raw_request: Request)` whose model is made of the document
    that the body reader has parsed. FastAPI would parse the body once more, and resolve the
    parameters of the endpoint for each request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        standard = super().get_route_handler()
        endpoint: Callable[[BaseModel, Request], Awaitable[Response]] = self.endpoint
        field = self.dependant.body_params[0]
        model, body = field.field_info.annotation, field._type_adapter

        async def handle(raw_request: Request) -> Response:
            document = document_of(raw_request.scope)
            if document is None:
                return await standard(raw_request)
            await validate_json_request(raw_request)
            try:
                request: BaseModel = await validated(body, document)
            except OF_VALIDATORS as error:
                raise unfit(error, model, document) from error
            return await endpoint(request, raw_request)

        return handle


async def validated(body: TypeAdapter[Any], document: dict[str, Any]) -> Any:
    """The request that `document` describes. A long `input`, whose items do not depend on one
    another, is validated in slices, and other requests are served in between.

    Raises:
        RequestValidationError
        Otherwise as the validators of the model.
    """
    items = document.get("input")
    most = _ITEMS_AT_A_TIME
    if not isinstance(items, list) or len(items) <= most:
        return _slice(body, document, document)
    request = _slice(body, {**document, "input": items[:most]}, document)
    for start in range(most, len(items), most):
        await asyncio.sleep(0)
        rest = _slice(body, {"input": items[start : start + most]}, document, start)
        request.input += rest.input
    return request


def _slice(
    body: TypeAdapter[Any], part: dict[str, Any], document: dict[str, Any], start: int = 0
) -> Any:
    """The request of `part` of a document; the items of its input begin at `start`."""
    try:
        return body.validate_python(part)
    except ValidationError as error:
        in_body = [
            {**found, "loc": ("body", *_shifted(found["loc"], start))}
            for found in error.errors(include_url=False)
        ]
        raise RequestValidationError(in_body, body=document) from None


def _shifted(loc: tuple[int | str, ...], start: int) -> tuple[int | str, ...]:
    """`loc` with `start` added to its first index."""
    place = next((place for place, step in enumerate(loc) if isinstance(step, int)), None)
    if place is None:
        return loc
    return (*loc[:place], int(loc[place]) + start, *loc[place + 1 :])


def take_documents(app: FastAPI) -> None:
    """Let vLLM's route that renders responses take the parsed document as well."""
    for place, route in enumerate(app.router.routes):
        if not isinstance(route, APIRoute) or route.path != _RENDER_RESPONSES:
            continue
        if route.dependant.body_params:
            app.router.routes[place] = ParsedRoute(
                route.path,
                route.endpoint,
                methods=route.methods,
                dependencies=route.dependencies,
                responses=route.responses,
            )


conversations = APIRouter(dependencies=[Depends(validate_json_request)], route_class=ParsedRoute)
status = APIRouter()
caches = APIRouter(prefix="/v1/cache", dependencies=[Depends(require_admin)])

_STREAMED: dict[int | str, dict[str, Any]] = {
    HTTPStatus.OK.value: {"content": {"text/event-stream": {}}}
}


@conversations.post("/v1/chat/completions", responses=_STREAMED)
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """Answer a conversation, whole or streamed. Its work is cancelled if the client leaves."""
    state = raw_request.app.state
    serving: OpenAIServingChat | None = state.openai_serving_chat
    if serving is None:
        raise NotImplementedError("the model does not support chat completions")
    with _Load(state) as load:
        context_of(raw_request.scope).writes_text = True
        answer: Any = await serving.create_chat_completion(request, raw_request)
        context = context_of(raw_request.scope) if state.loader is not None else None
        keep_alive_s = float(state.args.sse_keep_alive_interval)
        if isinstance(answer, TextStream):
            return TextEvents(answer, context, keep_alive_s, load.until_end())
        if isinstance(answer, AsyncGenerator):
            events = with_sse_keep_alive(answer, keep_alive_s)
            return EventStream(events, load.until_end(), context)
    if isinstance(answer, ErrorResponse):
        return _error(answer)
    body = answer.model_dump()
    if context is not None:
        usage.complete(body, context)
    load_format = raw_request.headers.get("endpoint-load-metrics-format", "")
    return JSONResponse(body, headers=metrics_header(load_format))


@conversations.post("/v1/responses", responses=_STREAMED)
async def create_response(request: ResponsesRequest, raw_request: Request) -> Response:
    """Answer a conversation in the dialect of OpenAI's responses, whole or streamed."""
    state = raw_request.app.state
    serving: OpenAIServingResponses | None = state.openai_serving_responses
    if serving is None:
        raise NotImplementedError("the model does not support responses")
    context = context_of(raw_request.scope) if state.loader is not None else None
    with _Load(state) as load:
        answer = await serving.create_responses(request, raw_request)
        if isinstance(answer, AsyncGenerator):
            return EventStream(_events_of_response(answer, context), load.until_end())
    if isinstance(answer, ErrorResponse):
        return _error(answer)
    body = answer.model_dump(mode="json", by_alias=True)
    if context is not None:
        usage.complete(body, context)
    return JSONResponse(body)


async def _events_of_response(
    events: AsyncGenerator[Any, None], context: RequestContext | None
) -> AsyncGenerator[str, None]:
    """The `events` as text; the usage is completed with the images of `context`, if it is given."""
    async with aclosing(events):
        async for event in events:
            answer = getattr(event, "response", None)
            if context is None or not isinstance(answer, ResponsesResponse) or answer.usage is None:
                data = event.model_dump_json(by_alias=True)
            else:
                body = event.model_dump(mode="json", by_alias=True)
                usage.complete(body["response"], context)
                data = msgspec.json.encode(body).decode()
            yield f"event: {event.type}\ndata: {data}\n\n"


@conversations.post("/v1/messages", responses=_STREAMED)
async def create_message(request: AnthropicMessagesRequest, raw_request: Request) -> Response:
    """Answer a conversation in Anthropic's dialect, whole or streamed."""
    state = raw_request.app.state
    context = context_of(raw_request.scope) if state.loader is not None else None
    with _Load(state) as load:
        context_of(raw_request.scope).writes_text = True
        answer: Any = await _messages(raw_request).create_messages(request, raw_request)
        if isinstance(answer, TextStream):
            return TextEvents(answer, context, 0, load.until_end())
        if isinstance(answer, AsyncGenerator):
            return EventStream(answer, load.until_end(), context)
    if isinstance(answer, ErrorResponse):
        return _error(answer)
    body = answer.model_dump(exclude_none=True)
    if context is not None:
        usage.complete(body, context)
    return JSONResponse(body)


@conversations.post("/v1/messages/count_tokens")
async def count_tokens(request: AnthropicCountTokensRequest, raw_request: Request) -> Response:
    """Count the tokens of a conversation."""
    with _Load(raw_request.app.state):
        answer = await _messages(raw_request).count_tokens(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return _error(answer)
    return JSONResponse(answer.model_dump(exclude_none=True))


def _messages(raw_request: Request) -> AnthropicServingMessages:
    serving: AnthropicServingMessages | None = raw_request.app.state.anthropic_serving_messages
    if serving is None:
        raise NotImplementedError("the model does not support messages")
    return serving


def _error(answer: ErrorResponse) -> JSONResponse:
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)


class _Load:
    """Counts a request for vLLM's route `/load`, if the server tracks its load."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._is_counted = bool(getattr(state, "enable_server_load_tracking", False))
        self._goes_on = False

    def __enter__(self) -> "_Load":
        if self._is_counted:
            self._state.server_load_metrics = getattr(self._state, "server_load_metrics", 0) + 1
        return self

    def __exit__(self, *_: object) -> None:
        if not self._goes_on:
            self._end()

    def until_end(self) -> Callable[[], None]:
        """Keep counting the request until the returned function is called."""
        self._goes_on = True
        return self._end

    def _end(self) -> None:
        if self._is_counted:
            self._state.server_load_metrics -= 1


# ---------------------------------------------------------------------- about the server


@status.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine is alive and moves, 503 when it has died or has not answered for long;
    while it is started again, the server is alive. Cheap enough for liveness probes."""
    if _is_starting_again(request.app.state):
        return Response(status_code=200)
    try:
        await request.app.state.engine_client.check_health()
    except EngineDeadError:
        return _unavailable("the engine has died")
    if request.app.state.heartbeat.stalled:
        return _unavailable("the engine does not answer")
    return Response(status_code=200)


@status.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests can be served: engine up, image workers up, not shutting down."""
    found = unreadiness(request.app.state)
    return Response(status_code=200) if found is None else _unavailable(found)


def unreadiness(state: State) -> str | None:
    """Why requests cannot be served now; None if they can."""
    if state.draining:
        return "the server is shutting down"
    if _is_starting_again(state):
        return restarts.MESSAGE
    if state.engine_client.errored:
        return "the engine has died"
    if state.heartbeat.stalled:
        return "the engine does not answer"
    if state.engines is not None and not state.engines():
        return "there is no engine"
    if state.image_pool is not None and not state.image_pool.ready:
        return "no image worker is available"
    return None


def _is_starting_again(state: State) -> bool:
    found: restarts.Restarts | None = state.restarts
    return found is not None and found.under_way


@status.get("/version")
async def version() -> dict[str, str]:
    """`version` is vLLM's, as in vLLM; `saccade` is ours."""
    return {"version": vllm_version, "saccade": __version__}


def _unavailable(message: str) -> JSONResponse:
    body = error_body(message, Unavailable.type, Unavailable.code)
    return JSONResponse(body, status_code=Unavailable.status)


# ---------------------------------------------------------------------- caches, for admins


@caches.get("")
async def show_caches(raw_request: Request) -> dict[str, Any]:
    """Entries, bytes, hits and misses of each cache, and the tiers of the embedding cache."""
    engine_caches: EngineCaches = raw_request.app.state.engine_caches
    fetched: FetchCache | None = raw_request.app.state.fetch_cache
    peers: Peers | None = raw_request.app.state.peers
    found = await engine_caches.report()
    if fetched is not None:
        found["urls"] = asdict(fetched.stats())
    for theirs in await peers.caches() if peers is not None else ():
        _add(found, theirs)
    return {"object": "cache", **found}


def _add(found: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Add the caches that another front end has for itself."""
    for cache in _OF_FRONT_ENDS & found.keys() & theirs.keys():
        for name, value in theirs[cache].items():
            if value is not None:
                found[cache][name] = (found[cache][name] or 0) + value


@caches.delete("")
async def clear_caches(raw_request: Request) -> dict[str, Any]:
    """Clear all caches of images. `cleared` names the caches that are empty now, except for the
    images of running requests."""
    engine_caches: EngineCaches = raw_request.app.state.engine_caches
    fetched: FetchCache | None = raw_request.app.state.fetch_cache
    cleared = await engine_caches.clear()
    if fetched is not None:
        fetched.clear()
        cleared.append("urls")
    if (peers := raw_request.app.state.peers) is not None:
        await peers.clear_caches()
    return {"object": "cache.cleared", "cleared": cleared}

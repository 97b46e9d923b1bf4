"""Reads request bodies and makes requests of them.

socket -> whole body, under a limit -> RequestReader -> RequestContext -> media loaded -> route
"""

import asyncio
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.concurrency import in_thread
from server.errors import RequestTimeout, RequestTooLarge, SaccadeError
from server.http.errors import respond, with_length
from server.http.scope import record_of, set_context
from server.ingest.load import MediaLoader
from server.request import context as contexts
from server.request.context import RequestContext, RetainedMedia
from server.request.dialects import dialect_of
from server.request.payloads import MIN_PAYLOAD_BYTES
from server.request.read import RequestReader
from server.settings import HttpSettings
from server.telemetry.stages import Stage

# Reading this much takes about 0.1 ms, the same as handing it to a thread.
_SMALL_BODY_BYTES = 8 * MIN_PAYLOAD_BYTES


class _ClientLeft(Exception):
    """The client left before its request was complete."""


class BodyReader:
    """Reads whole bodies up to a limit, makes the `RequestContext` of each request, and loads its
    media. The routes behind it get handles in the place of media.

    The context of a request without a JSON body has no media.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: HttpSettings,
        reader: RequestReader,
        loader: MediaLoader | None,
        retained: RetainedMedia | None,
        limits: Mapping[str, int],
    ) -> None:
        """`loader` is None if the model takes no media, `retained` if the server stores no
        responses. `limits` are lower limits for single paths, in bytes."""
        self._app = app
        self._max_bytes = settings.max_request_bytes
        self._timeout_s = settings.request_read_timeout_s
        self._reader = reader
        self._loader = loader
        self._retained = retained
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._pass(RequestContext(record_of(scope)), scope, receive, send)
            return
        timeline = record_of(scope).timeline
        try:
            max_bytes = min(self._max_bytes, self._limits.get(_path(scope), self._max_bytes))
            chunks = await self._read(dict(scope["headers"]), receive, max_bytes)
            timeline.begin(Stage.ADMISSION, time.monotonic())
            context, body = await self._prepared(scope, chunks)
            timeline.begin(Stage.RENDER, time.monotonic())
        except SaccadeError as error:
            await respond(error)(scope, receive, send)
            return
        except _ClientLeft:
            return
        scope = dict(scope) | {"headers": with_length(scope["headers"], len(body))}
        await self._pass(context, scope, _replay(body, receive), send)

    async def _pass(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        set_context(scope, context)
        contexts.enter(context)
        await self._app(scope, receive, send)

    async def _prepared(self, scope: Scope, chunks: list[bytes]) -> tuple[RequestContext, bytes]:
        """The context of a request, its media loaded, and the body for the route."""
        size = sum(map(len, chunks))
        if not size or not _is_json(scope):
            return RequestContext(record_of(scope)), await _joined(chunks, size)
        body = await _joined(chunks, size)
        args = (body, dialect_of(_path(scope)), record_of(scope))
        del body  # `read` holds it as long as it is needed
        if size < _SMALL_BODY_BYTES:
            read = self._reader.read(*args)
        else:
            read = await in_thread(self._reader.read, *args)
        del args
        if self._loader is not None and read.context.media:
            await self._loader.load(read.context)
        read.context.retained = self._retained
        return read.context, read.rewritten()

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive, max_bytes: int
    ) -> list[bytes]:
        """The chunks of the whole body. Memory grows with the bytes that arrive, not with the
        announced length."""
        announced = headers.get(b"content-length", b"")
        _check(int(announced) if announced.isdigit() else 0, max_bytes)
        chunks: list[bytes] = []
        received = 0
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(
                    f"no data of the request body arrived for {self._timeout_s:g} s"
                ) from None
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            chunk = message.get("body", b"")
            received += len(chunk)
            _check(received, max_bytes)
            chunks.append(chunk)
            if not message.get("more_body"):
                return chunks


async def _joined(chunks: list[bytes], size: int) -> bytes:
    """Join the chunks, and clear them so that the body is not held twice."""
    if size < _SMALL_BODY_BYTES or len(chunks) == 1:
        body = b"".join(chunks)
    else:
        body = await in_thread(b"".join, chunks)
    chunks.clear()
    return body


def _path(scope: Scope) -> str:
    """The path below the root path, as in the routes."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _check(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise RequestTooLarge(
            f"the request body has more than {max_bytes} bytes, which is the limit"
        )


def _is_json(scope: Scope) -> bool:
    """Whether FastAPI will parse the body as JSON: it has a JSON type, a `+json` type or none."""
    given: bytes = dict(scope["headers"]).get(b"content-type", b"").lower()
    media_type = given.partition(b";")[0].strip()
    if not media_type:
        return True
    return media_type.startswith(b"application/") and media_type.endswith((b"/json", b"+json"))


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives `body` first and then the client's messages, such as leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

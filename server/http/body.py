"""Reads request bodies and makes requests of them.

share of the budget -> whole body, under a limit -> RequestReader -> RequestContext
-> permit -> media loaded -> route

The permit is taken when all media of a request are known, and ends with its answer.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.concurrency import Begun, in_thread
from server.errors import RequestTimeout, RequestTooLarge, SaccadeError
from server.http.byte_budget import ByteBudget, Share
from server.http.errors import respond, with_length
from server.http.headers import length_in, value_of
from server.http.large_body import LEAST_BYTES, LargeBody
from server.http.scope import (
    connection_of,
    item_of,
    path_of,
    quotas_of,
    receives_directly,
    record_of,
    set_context,
    set_document,
)
from server.ingest.load import MediaLoader
from server.request import context as contexts
from server.request.admission import Admission, Permit
from server.request.context import RequestContext, RetainedMedia
from server.request.dialects import Dialect, dialect_of
from server.request.grounding import check_image
from server.request.read import SMALL_BODY_BYTES, ReadRequest, RequestReader
from server.settings import HttpSettings
from server.telemetry.record import Record
from server.telemetry.stages import Stage

# A body must reach the least rate after this time.
_RATE_GRACE_S = 30.0
# How often the rate of a large body is checked at least, and how often while its client may be
# silent: what has arrived is known only then.
_CHECK_INTERVAL_S = 5.0
_CHECKS_OF_SILENCE = 4


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
        budget: ByteBudget,
        parsed: Collection[str],
        admission: Admission,
        admitted: Collection[str],
    ) -> None:
        """`loader` is None if the model takes no media, `retained` if the server stores no
        responses. `limits` are lower limits for single paths, in bytes. `budget` bounds the bytes
        of all bodies together. `parsed` are the paths of routes that take the parsed document
        instead of a body (`ParsedRoute`), and `admitted` those of routes that need a permit."""
        self._app = app
        self._max_bytes = settings.max_request_bytes
        self._timeout_s = settings.request_read_timeout_s
        self._min_rate = settings.request_min_bytes_per_s
        self._reader = reader
        self._loader = loader
        self._retained = retained
        self._limits = limits
        self._budget = budget
        self._parsed = frozenset(parsed)
        self._admission = admission
        self._admitted = frozenset(admitted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._pass(RequestContext(record_of(scope)), scope, receive, send)
            return
        with Share(self._budget, background=item_of(scope) is not None) as share:
            await self._answer(share, dict(scope), receive, send)

    async def _answer(self, share: Share, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._arriving(scope):
                max_bytes = min(self._max_bytes, self._limits.get(path_of(scope), self._max_bytes))
                chunks = await self._read(scope, receive, max_bytes, share)
                record_of(scope).timeline.begin(Stage.ADMISSION, time.monotonic())
                read = await self._parse(scope, chunks)
        except SaccadeError as error:
            await respond(error)(scope, receive, send)
        except _ClientLeft:
            pass
        else:
            await self._admit(read, share, scope, receive, send)

    def _arriving(self, scope: Scope) -> contextlib.AbstractContextManager[None]:
        """The request arrives during the block. It is refused here, before its body is read, if it
        would have to wait too long for a permit."""
        if path_of(scope) not in self._admitted or item_of(scope) is not None:
            return contextlib.nullcontext()
        self._admission.check(record_of(scope), quotas_of(scope))
        if not _is_large(scope):
            return contextlib.nullcontext()
        return self._admission.arriving(record_of(scope))

    async def _admit(
        self, read: ReadRequest | bytes, share: Share, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Take a permit if the route needs one, and keep it until the answer is complete."""
        try:
            if path_of(scope) not in self._admitted:
                await self._load_and_pass(read, share, None, scope, receive, send)
                return
            async with self._permit(read, scope) as permit:
                await self._load_and_pass(read, share, permit, scope, receive, send)
        except SaccadeError as error:  # of admission or of loading; routes answer their own
            await respond(error)(scope, receive, send)

    def _permit(self, read: ReadRequest | bytes, scope: Scope) -> Permit:
        item = item_of(scope)
        cost, engine_requests = 1.0, 1
        if not isinstance(read, bytes):
            cost += len(read.context.media)
            if self._admission.limits.engine_requests is not None:
                engine_requests = read.engine_requests
        return self._admission.permit(
            record_of(scope),
            quotas_of(scope),
            cost,
            engine_requests,
            item.turn if item is not None else None,
            was_let_in=_is_large(scope),
        )

    async def _load_and_pass(
        self,
        read: ReadRequest | bytes,
        share: Share,
        permit: Permit | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        record = record_of(scope)
        if isinstance(read, bytes):
            context, body = RequestContext(record, permit=permit), read
        else:
            context = read.context
            context.permit = permit
            if self._loader is not None and context.media:
                await self._loader.load(context)
            if permit is not None:
                permit.is_loaded()
            context.retained = self._retained
            if self._retained is None:  # else the answer may be about a picture of earlier turns
                check_image(context.grounding, sum(len(ref.images) for ref in context.media))
            body = await self._body(read, scope)
            share.shrink(read.kept_bytes)
            read.release()
        record.timeline.begin(Stage.RENDER, time.monotonic())
        scope["headers"] = with_length(scope["headers"], len(body))
        await self._pass(context, scope, _replay(body, receive), send)

    async def _pass(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        set_context(scope, context)
        contexts.enter(context)
        await self._app(scope, receive, send)

    async def _parse(self, scope: Scope, chunks: list[bytes]) -> ReadRequest | bytes:
        """The request that was read; the body itself if it is not JSON."""
        size = sum(map(len, chunks))
        is_small = size < SMALL_BODY_BYTES
        if not size or not _is_json(scope):
            return _joined(chunks) if is_small else await in_thread(_joined, chunks)
        args = (chunks, dialect_of(path_of(scope)), record_of(scope))
        return self._read_json(*args) if is_small else await in_thread(self._read_json, *args)

    def _read_json(self, chunks: list[bytes], dialect: Dialect, record: Record) -> ReadRequest:
        return self._reader.read(_joined(chunks), dialect, record)

    async def _body(self, read: ReadRequest, scope: Scope) -> bytes:
        """The body for the route, with handles in the place of media; empty if the route takes the
        document, which is then stored in `scope`."""
        read.place_handles()
        if path_of(scope) in self._parsed and (document := read.whole()) is not None:
            set_document(scope, document)
            return b""
        return read.written() if read.is_small else await in_thread(read.written)

    async def _read(
        self, scope: Scope, receive: Receive, max_bytes: int, share: Share
    ) -> list[bytes]:
        """The chunks of the whole body. Memory grows with the bytes that arrive, but `share` has
        the announced length from the start: if it grew too, bodies would wait for one another."""
        announced = length_in(value_of(scope, b"content-length"))
        _check(announced, max_bytes)
        if announced > SMALL_BODY_BYTES:
            connection = connection_of(scope)
            was_let_in = connection is not None and connection.body_begins()
            await share.grow(announced, was_let_in=was_let_in)
        chunks: list[bytes] = []
        received = 0
        begin = time.monotonic()
        while True:
            if received > SMALL_BODY_BYTES:
                await self._budget.turns.next()
            message = await self._next(receive)
            if message["type"] == "http.disconnect":
                raise _ClientLeft
            chunk = message.get("body", b"")
            received += len(chunk)
            _check(received, max_bytes)
            chunks.append(chunk)
            if not message.get("more_body"):
                return chunks
            self._check_rate(received, time.monotonic() - begin)
            if received > max(announced, SMALL_BODY_BYTES):  # sent in chunks, of unknown length
                await share.grow(min(2 << received.bit_length(), max_bytes))
            if (rest := _rest(scope, receive, announced - received)) is not None:
                with rest:
                    chunks += await self._read_rest(rest, received, begin)
                received = announced - rest.left

    async def _read_rest(self, rest: LargeBody, received: int, begin: float) -> list[bytes]:
        """The rest of a body, which began to arrive at `begin`. Ends early if the client leaves,
        which the next message tells."""
        chunks: list[bytes] = []
        last = time.monotonic()
        wait_s = min(self._timeout_s / _CHECKS_OF_SILENCE, _CHECK_INTERVAL_S)
        while rest.left and not rest.has_ended:
            pieces = await rest.pieces(wait_s)
            now = time.monotonic()
            if pieces:
                last = now
            elif now - last >= self._timeout_s:
                raise self._late()
            received += sum(map(len, pieces))
            chunks += pieces
            self._check_rate(received, now - begin)
        return chunks

    async def _next(self, receive: Receive) -> Message:
        """The next message. Most requests have arrived as a whole, and need no time limit."""
        step = Begun(receive())
        if step.begin():
            return step.result
        try:
            async with asyncio.timeout(self._timeout_s):
                return await step.rest()
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> RequestTimeout:
        return RequestTimeout(f"no data of the request body arrived for {self._timeout_s:g} s")

    def _check_rate(self, received: int, seconds: float) -> None:
        if seconds > _RATE_GRACE_S and received < self._min_rate * seconds:
            raise RequestTimeout(
                f"the request body arrived at less than {self._min_rate} bytes per second"
            )


def _is_large(scope: Scope) -> bool:
    return length_in(value_of(scope, b"content-length")) > SMALL_BODY_BYTES


def _rest(scope: Scope, receive: Receive, left: int) -> LargeBody | None:
    """To read the `left` bytes of a body past uvicorn; None if they have to come as messages."""
    if left < LEAST_BYTES or not receives_directly(scope, receive):
        return None
    connection = connection_of(scope)
    return connection.rest_of_body(left) if connection is not None else None


def _joined(chunks: list[bytes]) -> bytes:
    """Join the chunks, and clear them so that the body is not held twice."""
    body = b"".join(chunks)
    chunks.clear()
    return body


def _check(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise RequestTooLarge(
            f"the request body has more than {max_bytes} bytes, which is the limit"
        )


def _is_json(scope: Scope) -> bool:
    """Whether FastAPI will parse the body as JSON: it has a JSON type, a `+json` type or none."""
    media_type = value_of(scope, b"content-type").lower().partition(b";")[0].strip()
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

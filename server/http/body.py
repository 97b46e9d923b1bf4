"""The way of a request body into the server: bounded, and without its image payloads."""

import asyncio
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import RequestTimeout, RequestTooLarge, SaccadeError
from server.http.errors import respond, with_length
from server.ingest.load import in_thread
from server.request import context as request
from server.request import payloads
from server.request.context import RequestContext
from server.request.image_request import ImageRequest
from server.request.payloads import MIN_PAYLOAD_BYTES
from server.request.prepare import ReadRequest, RequestPreparer
from server.settings import HttpSettings
from server.telemetry import record
from server.telemetry.stages import Stage

# A JSON body without any of these has no image, no file and no option of ours.
_MARKS = (b"image", b'file"', b"document")


class _Disconnected(Exception):
    """The client left before its request was complete."""


class BodyReader:
    """Reads bodies whole, up to a limit, takes image payloads out of JSON, and has what remains
    prepared: options read, files turned into images.

    The paths in `limits` have lower limits, in bytes. On the paths in `stored` bodies keep their
    payloads, since the server keeps the request. With `preparer` None, all bodies pass as they
    are.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: HttpSettings,
        preparer: RequestPreparer | None,
        stored: frozenset[str],
        limits: Mapping[str, int],
    ) -> None:
        self._app = app
        self._max_bytes = settings.max_request_bytes
        self._timeout_s = settings.request_read_timeout_s
        self._preparer = preparer
        self._stored = stored
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            request.enter(RequestContext(record.current()))
            await self._app(scope, receive, send)
            return
        try:
            max_bytes = min(self._max_bytes, self._limits.get(_path(scope), self._max_bytes))
            chunks = await self._read(dict(scope["headers"]), receive, max_bytes)
            timeline = record.current().timeline
            timeline.begin(Stage.ADMISSION, time.monotonic())
            body = await self._prepared(scope, chunks)
            timeline.begin(Stage.RENDER, time.monotonic())
        except SaccadeError as error:
            await respond(error)(scope, receive, send)
            return
        except _Disconnected:
            return
        scope = dict(scope) | {"headers": with_length(scope, len(body))}
        await self._app(scope, _replay(body, receive), send)

    async def _prepared(self, scope: Scope, chunks: list[bytes]) -> bytes:
        """The body for the route; the current task can load its images from now on."""
        is_json = _content_type(scope).startswith(b"application/json")
        large = sum(map(len, chunks)) >= MIN_PAYLOAD_BYTES
        body = b"" if large else b"".join(chunks)
        if self._preparer is None or not is_json:
            request.enter(ImageRequest(record.current()))
            return await asyncio.to_thread(_joined, chunks) if large else body
        if not large and not any(mark in body for mark in _MARKS):
            request.enter(ImageRequest(record.current(), body=body))
            return body
        stored = _path(scope) in self._stored
        request.enter(ImageRequest(record.current(), body=body))  # for the errors of what follows
        if large:
            read = await in_thread(self._take_out_and_read, chunks, stored)
        else:
            read = self._preparer.read(payloads.parsed(body))
        request.enter(read.request)
        request.enter(await self._preparer.complete(read, stored=stored))
        return read.request.body

    def _take_out_and_read(self, chunks: list[bytes], stored: bool) -> ReadRequest:
        assert self._preparer is not None
        body = _joined(chunks)
        taken = payloads.parsed(body) if stored else payloads.take_out(body)
        return self._preparer.read(taken)

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive, max_bytes: int
    ) -> list[bytes]:
        """The whole body, as it comes: memory grows with what arrives, not what is announced."""
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
                    f"the request body stopped for {self._timeout_s:g} s"
                ) from None
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunk = message.get("body", b"")
            received += len(chunk)
            _check(received, max_bytes)
            chunks.append(chunk)
            if not message.get("more_body"):
                return chunks


def _joined(chunks: list[bytes]) -> bytes:
    """The body, which is not to be held twice from here on."""
    body = b"".join(chunks)
    chunks.clear()
    return body


def _path(scope: Scope) -> str:
    """The path as the routes know it, below the root path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _check(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise RequestTooLarge(
            f"the request body has more than {max_bytes} bytes, which is the limit"
        )


def _content_type(scope: Scope) -> bytes:
    return dict(scope["headers"]).get(b"content-type", b"").lower()  # type: ignore[no-any-return]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives `body` first and then what the client does, such as leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

"""The way of a request body into the server: bounded, and without its image payloads."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import respond, with_length
from server.config import HttpSettings
from server.errors import RequestTimeout, RequestTooLarge, SaccadeError
from server.media import payloads
from server.media.payloads import MIN_PAYLOAD_BYTES, Payloads


class _Disconnected(Exception):
    """The client left before its request was complete."""


class BodyReader:
    """Reads bodies whole, up to a limit, and takes image payloads out of JSON.

    `untouched` are the paths whose bodies keep their payloads; None stands for all paths.
    """

    def __init__(
        self, app: ASGIApp, settings: HttpSettings, untouched: frozenset[str] | None
    ) -> None:
        self._app = app
        self._max_bytes = settings.max_request_bytes
        self._timeout_s = settings.request_read_timeout_s
        self._untouched = untouched

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            small = await self._small_body(scope, headers, receive)
        except SaccadeError as error:
            await respond(error)(scope, receive, send)
            return
        except _Disconnected:
            return
        scope = dict(scope) | {"headers": with_length(scope, len(small))}
        await self._app(scope, _replay(small, receive), send)

    async def _small_body(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive
    ) -> bytes:
        """The body without its payloads, which the current task can load from now on."""
        chunks = await self._read(headers, receive)
        is_json = headers.get(b"content-type", b"").lower().startswith(b"application/json")
        if not is_json or sum(map(len, chunks)) < MIN_PAYLOAD_BYTES:
            body = b"".join(chunks)
            payloads.enter(Payloads(body if is_json else b""))
            return body
        if self._untouched is None or scope["path"] in self._untouched:
            taken = Payloads(await asyncio.to_thread(b"".join, chunks))
        else:
            taken = await asyncio.to_thread(_take_out, chunks)
        payloads.enter(taken)
        return taken.body

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> list[bytes]:
        """The whole body, as it comes: memory grows with what arrives, not what is announced."""
        announced = headers.get(b"content-length", b"")
        self._check(int(announced) if announced.isdigit() else 0)
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
            self._check(received)
            chunks.append(chunk)
            if not message.get("more_body"):
                return chunks

    def _check(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise RequestTooLarge(
                f"the request body has more than {self._max_bytes} bytes, which is the limit"
            )


def _take_out(chunks: list[bytes]) -> Payloads:
    body = b"".join(chunks)
    chunks.clear()
    return payloads.take_out(body)


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

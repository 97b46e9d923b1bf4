"""The way of a request body into the server: bounded, and without its image payloads."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import respond
from server.config import HttpSettings
from server.errors import RequestTimeout, RequestTooLarge, SaccadeError
from server.media import payloads
from server.media.payloads import MIN_PAYLOAD_BYTES, Payloads

# vLLM's responses store keeps the request for later turns, when the payloads are gone.
_KEPT_WHOLE = ("/v1/responses",)


class _Disconnected(Exception):
    """The client left before its request was complete."""


class BodyReader:
    """Reads JSON bodies whole, up to a limit, and takes image payloads out of them."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, keeps_responses: bool) -> None:
        self._app = app
        self._max_bytes = settings.max_request_bytes
        self._timeout_s = settings.request_read_timeout_s
        self._whole = _KEPT_WHOLE if keeps_responses else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            body = await self._read(headers, receive)
        except SaccadeError as error:
            await respond(error)(scope, receive, send)
            return
        except _Disconnected:
            return
        if headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            taken = await self._take_out(scope["path"], body)
            payloads.enter(taken)
            small = taken.body
        else:
            small = bytes(body)
        if len(small) != len(body):
            scope = dict(scope) | {"headers": _with_length(scope, len(small))}
        await self._app(scope, _replay(small, receive), send)

    async def _take_out(self, path: str, body: bytearray) -> Payloads:
        if len(body) < MIN_PAYLOAD_BYTES or path in self._whole:
            return Payloads(bytes(body))
        return await asyncio.to_thread(payloads.take_out, body)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytearray:
        """The whole body, in memory that is allocated once where its length is announced."""
        announced = headers.get(b"content-length", b"")
        expected = int(announced) if announced.isdigit() else 0
        self._check(expected)
        body, received = bytearray(expected), 0
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
            self._check(received + len(chunk))
            body[received : received + len(chunk)] = chunk
            received += len(chunk)
            if not message.get("more_body"):
                del body[received:]
                return body

    def _check(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise RequestTooLarge(
                f"the request body has more than {self._max_bytes} bytes, which is the limit"
            )


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


def _with_length(scope: Scope, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]

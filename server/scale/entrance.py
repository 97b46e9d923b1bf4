"""Where requests come in from Ray Serve: what our own HTTP server does for the app, and Ray Serve
does not."""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.large_body import LargeBody
from server.http.scope import set_connection
from server.http.server import SECURITY_HEADERS

# Ray Serve's proxy adds it too; it has given the request this id.
_ID = b"x-request-id"
# For a request to end by itself when its client has left.
_LEAVING_S = 1.0
_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS]


class Entrance:
    """An ASGI app: `app` with security headers in every answer. Ray Serve cancels a request whose
    client leaves; here it learns why."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [each for each in message["headers"] if each[0].lower() != _ID]
                message = {**message, "headers": [*_HEADERS, *kept]}
            await send(message)

        connection = _Connection()
        set_connection(scope, connection)
        work = asyncio.ensure_future(self._app(scope, receive, with_headers))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            pending = {work}
            if connection.leave():
                _, pending = await asyncio.wait(pending, timeout=_LEAVING_S)
            if pending:
                work.cancel()
                await asyncio.wait(pending)
            raise


class _Connection:
    """The client's connection, which ends at Ray Serve's proxy."""

    engine_has_died = False

    def __init__(self) -> None:
        self.on_leaving: Callable[[], None] | None = None

    def body_begins(self) -> bool:
        """None was let in by its head."""
        return False

    def rest_of_body(self, nbytes: int) -> LargeBody | None:
        """Bodies come as messages."""
        return None

    def leave(self) -> bool:
        """Returns whether the request has been told."""
        if self.on_leaving is None:
            return False
        self.on_leaving()
        return True

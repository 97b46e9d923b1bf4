"""Streams an answer as server-sent events."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.concurrency import Begun
from server.http.scope import direct_send

# Events that are ready together are sent together, up to this size.
_MAX_BYTES = 64 * 1024


class EventStream(Response):
    """Sends `events` as they come, in the task of the request.

    Events that the generator has ready are sent together with those before them: the first two of
    an answer, and the last token with the usage and the end, since each write costs a system call.
    The body passes only the layers that look at it (`direct_send`). Starlette's StreamingResponse
    sends events one by one, and waits for the client to leave in an additional task; here
    `http/client.py` does that for the whole request.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], on_end: Callable[[], None]) -> None:
        """`on_end` is called when the stream is over, however it ends."""
        self.status_code = 200
        self.background = None
        self._events = events
        self._on_end = on_end
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = direct_send(scope) or send
            async with aclosing(self._events) as events:
                rest = await _send_events(events, send)
            await send({"type": "http.response.body", "body": rest})
        finally:
            self._on_end()


async def _send_events(events: AsyncGenerator[str, None], send: Send) -> bytes:
    """Send the ready events whenever the next one is not ready; returns the unsent rest."""
    ready = bytearray()
    while True:
        step = Begun(events.asend(None))
        try:
            if not step.begin() and ready:
                try:
                    await _send_piece(ready, send)
                except BaseException as error:
                    with suppress(StopAsyncIteration):
                        await step.fail(error)
                    raise
            event = step.result if step.is_over else await step.rest()
        except StopAsyncIteration:
            return bytes(ready)
        ready += event.encode()
        if len(ready) > _MAX_BYTES:
            await _send_piece(ready, send)


async def _send_piece(ready: bytearray, send: Send) -> None:
    body = bytes(ready)
    ready.clear()
    await send({"type": "http.response.body", "body": body, "more_body": True})

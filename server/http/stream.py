"""Streams an answer as server-sent events."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.concurrency import Begun, cancel
from server.http.scope import direct_send
from server.http.usage import CompletingStream, complete
from server.request.context import RequestContext

# Events that are ready together are sent together, up to this size.
_MAX_BYTES = 64 * 1024
_COMMENT = b": keep-alive\n\n"


class EventStream(Response):
    """Sends `events` as they come, in the task of the request.

    Events that the generator has ready are sent together with those before them: the first two of
    an answer, and the last token with the usage and the end, since each write costs a system call.
    The body passes only the layers that look at it (`direct_send`). Starlette's StreamingResponse
    sends events one by one, and waits for the client to leave in an additional task; here
    `http/client.py` does that for the whole request.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        on_end: Callable[[], None],
        context: RequestContext | None = None,
    ) -> None:
        """`on_end` is called when the stream is over, however it ends. The usage in `events` is
        completed with the images of `context`, if it is given."""
        self.status_code = 200
        self.background = None
        self._events = events
        self._on_end = on_end
        self._context = context
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send = direct_send(scope) or send
            if self._context is not None:
                send = CompletingStream(self._context, send).send
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


class Text(Protocol):
    """An answer that writes its events itself."""

    async def write(
        self,
        write: Callable[[bytes, bool], Awaitable[None]],
        complete: Callable[[dict[str, Any]], None],
        *,
        in_callback: bool,
    ) -> None:
        """Call `write` with events, and whether more follow. With `in_callback`, it may be called
        outside of the current task. `complete` may change the event with the usage before it is
        written."""


class TextEvents(Response):
    """Sends the events of a text, each as soon as it is known, in the task of the request."""

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: Text,
        context: RequestContext | None,
        keep_alive_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """The usage is completed with the images of `context`, if it is given. A comment is sent
        whenever nothing else was sent for `keep_alive_s` seconds, unless that is 0. `on_end` is
        called when the stream is over, however it ends."""
        self.status_code = 200
        self.background = None
        self._stream = stream
        self._context = context
        self._keep_alive_s = keep_alive_s
        self._on_end = on_end
        self.init_headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            direct = direct_send(scope)
            # What other middleware does may need the task of the request.
            is_direct, send = direct is not None, direct or send
            if not self._keep_alive_s:
                await self._write(send, in_callback=is_direct)
                return
            async with _kept_alive(send, self._keep_alive_s) as send:
                await self._write(send, in_callback=is_direct)
        finally:
            self._on_end()

    def _write(self, send: Send, *, in_callback: bool) -> Awaitable[None]:
        def write(events: bytes, more: bool) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": events, "more_body": more})

        return self._stream.write(write, self._complete, in_callback=in_callback)

    def _complete(self, event: dict[str, Any]) -> None:
        if self._context is not None:
            complete(event, self._context)


@asynccontextmanager
async def _kept_alive(send: Send, interval_s: float) -> AsyncIterator[Send]:
    """`send`, and comments in between when it was not called for `interval_s` seconds."""
    last = time.monotonic()

    async def noting(message: Any) -> None:
        nonlocal last
        last = math.inf  # no comment while this waits for the client
        await send(message)
        last = time.monotonic()

    async def comment() -> None:
        while True:
            idle_s = time.monotonic() - last
            if idle_s >= interval_s:
                await noting({"type": "http.response.body", "body": _COMMENT, "more_body": True})
            else:
                await asyncio.sleep(min(interval_s, interval_s - idle_s))

    comments = asyncio.create_task(comment())
    try:
        yield noting
    finally:
        await cancel(comments)

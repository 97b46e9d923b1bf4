"""Streams an answer as server-sent events."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, suppress
from functools import partial
from types import coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# Events that are ready together are sent together, up to this size.
_MAX_BYTES = 64 * 1024


class EventStream(Response):
    """Sends `events` as they come, in the task of the request.

    Events that the generator has ready are sent together with those before them: the first two of
    an answer, and the last token with the usage and the end. Each write costs a system call and a
    pass through the middleware. Starlette's StreamingResponse sends them one by one, and waits for
    the client to leave in an additional task; here `http/client.py` does that for the whole
    request.
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
            async with aclosing(self._events) as events:
                rest = await _send_events(events, send)
            await send({"type": "http.response.body", "body": rest})
        finally:
            self._on_end()


async def _send_events(events: AsyncGenerator[str, None], send: Send) -> bytes:
    """Send the ready events whenever the next one is not ready; returns the unsent rest."""
    ready = bytearray()
    while True:
        step = _Step(events)
        try:
            event = step.begin()
            if event is None:
                if ready:
                    try:
                        await _send_piece(ready, send)
                    except BaseException as error:
                        await step.fail(error)
                        raise
                event = await step.event()
        except StopAsyncIteration:
            return bytes(ready)
        ready += event.encode()
        if len(ready) > _MAX_BYTES:
            await _send_piece(ready, send)


async def _send_piece(ready: bytearray, send: Send) -> None:
    body = bytes(ready)
    ready.clear()
    await send({"type": "http.response.body", "body": body, "more_body": True})


class _Step:
    """A step of an async generator that begins before it is awaited.

    This does by hand what `await` does: it passes values that the step yields to the event loop,
    and the results back to the step.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self._step: Any = events.asend(None)
        self._yielded: Any = None

    def begin(self) -> str | None:
        """The next event if it is ready; None if not.

        Raises:
            StopAsyncIteration: there are no more events.
        """
        try:
            self._yielded = self._step.send(None)
        except StopIteration as ended:
            event: str = ended.value
            return event
        return None

    async def event(self) -> str:
        """The event that was not ready. Raises StopAsyncIteration."""
        event: str = await self._rest()
        return event

    async def fail(self, error: BaseException) -> None:
        """Raise `error` in the step instead, and wait until the generator has handled it."""
        with suppress(StopAsyncIteration):
            try:
                self._yielded = self._step.throw(error)
            except StopIteration:
                return
            await self._rest()

    @coroutine
    def _rest(self) -> Generator[Any, Any, Any]:
        while True:
            resume: Callable[[], Any]
            try:
                resume = partial(self._step.send, (yield self._yielded))
            except BaseException as error:
                resume = partial(self._step.throw, error)
            try:
                self._yielded = resume()
            except StopIteration as ended:
                return ended.value

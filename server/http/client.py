"""The client's side of a request: receives its messages, and notices when it leaves."""

import asyncio

from starlette.types import Message, Receive

from server.http.answer import Answer
from server.telemetry.record import Record


class Client:
    """Receives the client's messages. If `aborts` is set, one task waits from the end of the body
    on for the client to leave, and then cancels the work of the request."""

    def __init__(self, receive: Receive, record: Record, answer: Answer, *, aborts: bool) -> None:
        self._receive = receive
        self._record = record
        self._answer = answer
        self._aborts = aborts
        self._watch: asyncio.Task[Message] | None = None
        self._work: asyncio.Task[None] | None = None
        self._cancelled = False

    async def receive(self) -> Message:
        """The next ASGI message. A caller that waits for one after the body gets the disconnect as
        a message, and is not cancelled."""
        if self._watch is not None:
            self._work = None
            return await asyncio.shield(self._watch)
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._note_leaving()
        elif self._aborts and not message.get("more_body"):
            self._work = asyncio.current_task()
            self._watch = asyncio.create_task(self._wait())
        return message

    def forgive_cancelling(self) -> bool:
        """Whether the work was cancelled only because the client left; if so, clears that."""
        task = asyncio.current_task()
        return self._cancelled and task is not None and task.uncancel() == 0

    def stop_watching(self) -> None:
        """Stop waiting for the client to leave. Call it at the end of the request."""
        self._work = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None  # it refers to this object: together they would wait for the GC

    async def _wait(self) -> Message:
        message = await self._receive()
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self._note_leaving()
        if self._work is not None and not self._answer.has_ended:
            self._cancelled = True
            self._work.cancel()
        return message

    def _note_leaving(self) -> None:
        if not self._answer.has_ended:
            self._record.left_in = self._record.left_in or self._record.timeline.stage()

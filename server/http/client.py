"""The client's side of a request: receives its messages, and notices when it leaves."""

import asyncio
import time
from typing import Any

from starlette.types import Message, Receive

from server.http.answer import Answer
from server.http.scope import Connection
from server.telemetry.record import Record
from server.telemetry.stages import Stage


class Client:
    """Receives the client's messages. With a `connection`, the work of the request is cancelled
    when the client leaves after it has sent the body. It is also cancelled at the deadline of
    `record`, if it has one; what it would answer after that is dropped."""

    def __init__(
        self, receive: Receive, record: Record, answer: Answer, connection: Connection | None
    ) -> None:
        self._receive = receive
        self._record = record
        self._answer = answer
        self._connection = connection
        self._work: asyncio.Task[Any] | None = None
        self._body_ended = False
        self._cancelled = 0
        self._timer: asyncio.TimerHandle | None = None
        self.is_late = False
        self.late_in: Stage | None = None
        if connection is not None:
            connection.on_leaving = self._leave
        if record.deadline is not None:
            work = asyncio.current_task()
            assert work is not None
            left_s = record.deadline - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expire, work)

    async def receive(self) -> Message:
        """The next ASGI message. A caller that waits for one after the body gets the disconnect as
        a message, and is not cancelled."""
        self._work = None
        message = await self._receive()
        while self._body_ended and message["type"] != "http.disconnect":
            message = await self._receive()
        if message["type"] == "http.disconnect":
            self._note_leaving()
        elif not message.get("more_body"):
            self._body_ended = True
            self._work = asyncio.current_task()
        return message

    def forgive_cancelling(self) -> bool:
        """Whether the work was cancelled only because the client left or the deadline passed; if
        so, clears that."""
        task = asyncio.current_task()
        assert task is not None
        was_cancelled, left = self._cancelled > 0, task.cancelling()
        for _ in range(self._cancelled):
            left = task.uncancel()
        self._cancelled = 0
        return was_cancelled and left == 0

    def stop_watching(self) -> None:
        """Stop waiting for the client to leave. Call it at the end of the request."""
        self._work = None
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None and self._connection.on_leaving == self._leave:
            self._connection.on_leaving = None

    def _leave(self) -> None:
        self._note_leaving()
        if self._work is not None and not self._answer.has_ended:
            self._cancelled += 1
            self._work.cancel()

    def _expire(self, work: asyncio.Task[Any]) -> None:
        if not self._answer.has_ended and self._record.left_in is None:
            self.is_late = True
            self.late_in = self._record.timeline.stage()
            self._answer.is_cut = True
            self._cancelled += 1
            work.cancel()

    def _note_leaving(self) -> None:
        if not self._answer.has_ended:
            self._record.left_in = self._record.left_in or self._record.timeline.stage()

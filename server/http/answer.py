"""The only wrapper around an outgoing answer: sets headers, shapes errors, takes times.

It acts on the first message, on errors and on the last message. Chunks of a stream in between are
passed on without an additional coroutine.
"""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Iterable

from starlette.types import Message, Send

from server.concurrency import DONE
from server.errors import SaccadeError, error_body
from server.http import errors
from server.telemetry.record import Record, Times
from server.telemetry.stages import Stage, Timeline

ID_HEADER = b"x-request-id"
# An event by which vLLM reports an error in a stream that has begun.
_STREAMED_ERROR = re.compile(rb'(?:\A|\n\n)(?:data: {"error"|event: error|event: response\.failed)')
# Bodies of errors have a few hundred bytes; longer ones are passed on as they are.
_MAX_ERROR_BYTES = 64 * 1024
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:=+/-]{1,128}\Z")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that the client gave its request, or a new one."""
    given = next((value for name, value in headers if name == ID_HEADER), b"")
    return given.decode() if _SAFE_ID.match(given) else secrets.token_hex(16)


class Answer:
    """Passes an answer on. `times` are set at the end of a stream. While `is_cut` is set, messages
    are dropped, until `fail` ends the answer. `was_cancelled` is set if an error was dropped with
    which vLLM answers a cancelled request, as if its client had left."""

    def __init__(self, record: Record, send: Send, *, server_timing: bool) -> None:
        self._record = record
        self._send = send
        self._server_timing = server_timing
        self._dialect = errors.dialect_of(record.path)
        self._streams = False
        self._is_plain = True
        self._is_first_piece = True
        self._fails = False
        self._error_start: Message | None = None
        self._error_body = b""
        self.has_begun = False
        self.is_cut = False
        self.was_cancelled = False
        self.has_ended = False
        self.times: Times | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Send one ASGI message."""
        if self.is_cut:
            return DONE
        if message["type"] == "http.response.body":
            if self._error_start is not None:
                return self._hold(message)
            if self._streams:
                message = self._look_at(message)
            if not message.get("more_body"):
                message = self._end(message)
        elif message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._error_start = message
                return DONE
            message = self._start(message)
        return self._send(message)

    async def fail(self, error: SaccadeError) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun. Any other
        answer that has begun is cut off."""
        self.is_cut = False
        self._fails = True
        body = error_body(error.message, error.type, error.code, error.param)
        if self.has_begun:
            if self._streams and self._is_plain and not self.has_ended:
                events = b"data: " + json.dumps(body).encode() + b"\n\n"
                if self._dialect == "openai":
                    events += b"data: [DONE]\n\n"
                await self.send({"type": "http.response.body", "body": events})
            return
        self._error_start, self._error_body = None, b""
        await errors.respond(error)({"type": "http"}, _no_messages, self.send)

    def _is_cancelled(self) -> bool:
        """Whether the request was cancelled, and not because its client has left."""
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0 and self._record.left_in is None

    async def _hold(self, message: Message) -> None:
        """Hold an error back until it is complete, then send it in the shape of its dialect."""
        self._error_body += message.get("body", b"")
        more = bool(message.get("more_body"))
        if more and len(self._error_body) <= _MAX_ERROR_BYTES:
            return
        start, body = self._error_start, self._error_body
        assert start is not None
        self._error_start, self._error_body = None, b""
        if not self._fails and self._is_cancelled():
            self.was_cancelled = True
            return
        shaped = None
        if not more:
            shaped = errors.shaped(body, start["status"], self._dialect, self._record.id)
        if shaped is not None:
            body, self._record.error_code = shaped
            start = {**start, "headers": errors.with_length(start["headers"], len(body))}
        await self._send(self._start(start))
        message = {**message, "body": body}
        await self._send(message if more else self._end(message))

    def _start(self, message: Message) -> Message:
        record = self._record
        self.has_begun = True
        record.status = message["status"]
        headers = [item for item in message.get("headers", ()) if item[0].lower() != ID_HEADER]
        headers.append((ID_HEADER, record.id.encode()))
        headers += record.headers
        self._streams = _value(headers, b"content-type").startswith(b"text/event-stream")
        self._is_plain = not _value(headers, b"content-encoding")
        if self._server_timing and not self._streams:
            times = Times.of(record.timeline, time.monotonic())
            headers.append((b"server-timing", server_timing(times, record.timeline).encode()))
        return {**message, "headers": headers}

    def _look_at(self, message: Message) -> Message:
        """Note the time of the first chunk of a stream, and shape the errors in it."""
        if self._is_first_piece and self._record.timeline.began(Stage.GENERATE):
            self._is_first_piece = False
            self._record.timeline.begin_again(Stage.GENERATE, time.monotonic())
        body = message.get("body", b"")
        if not (b"error" in body or b"failed" in body) or not _STREAMED_ERROR.search(body):
            return message
        events = body.split(b"\n\n")
        for number, event in enumerate(events):
            if _STREAMED_ERROR.match(event):
                shaped = errors.shaped_event(event, self._dialect, self._record)
                events[number], self._record.error_code = shaped
        return {**message, "body": b"\n\n".join(events)}

    def _end(self, message: Message) -> Message:
        record = self._record
        self.has_ended = True
        record.complete = not self._streams or record.error_code is None
        if not self._streams:
            return message
        self.times = Times.of(record.timeline, time.monotonic())
        if self._server_timing and self._is_plain:
            comment = f": server-timing {server_timing(self.times, record.timeline)}\n\n"
            return {**message, "body": message.get("body", b"") + comment.encode()}
        return message


async def _no_messages() -> Message:
    raise AssertionError("an error needs no messages of the client")


def _value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key.lower() == name), b"")


def server_timing(times: Times, timeline: Timeline) -> str:
    """The value of the header `Server-Timing` (W3C): milliseconds by stage, and in total."""
    parts = [f"{stage};dur={seconds * 1e3:.1f}" for stage, seconds in times.stages.items()]
    return ", ".join([*parts, f"total;dur={(times.end - timeline.start) * 1e3:.1f}"])

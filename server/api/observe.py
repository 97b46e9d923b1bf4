"""Around the app: each request gets an id and a record; what it says becomes metrics, a header, a
line in the log and a trace.

The id is the client's `X-Request-Id`, or else a new one, and every answer names it. Stages of
requests that are answered whole are in the header `Server-Timing`, those of streams in a comment at
their end.
"""

import re
import time
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.errors import CODES
from server.observability import log, tracing
from server.observability import record as records
from server.observability.record import Record
from server.observability.stages import Segment, Stage, Timeline, totals

_ID = b"x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,128}\Z")
_PATH_LENGTH = 200
_FAILED_STATUS = 400
# What is asked over and over by machines is logged only where it fails.
_PROBES = frozenset({"/health", "/ready", "/ping", "/load", "/metrics", "/version"})


class Observed:
    """ASGI application around `app`. Only POST requests have stages, metrics and spans."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        server_timing: bool,
        log_requests: bool,
        unlogged: Iterable[str] = (),
        traced: bool,
    ) -> None:
        """`unlogged` are paths without a line in the log. With `traced`, the process has a tracer
        provider."""
        self._app = app
        self._server_timing = server_timing
        self._log_requests = log_requests
        self._unlogged = frozenset(unlogged)
        self._tracing = tracing.Tracing() if traced else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record(scope)
        records.enter(record)
        is_work = record.method == "POST"
        if is_work and self._tracing is not None:
            scope = self._tracing.start(record, scope)
        answer = _Answer(record, send, server_timing=self._server_timing and is_work)

        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not answer.complete:
                record.left_in = record.left_in or record.timeline.stage()
            return message

        if is_work:
            metrics.requests_in_flight.inc()
        try:
            await self._app(scope, hear, answer.send)
        finally:
            if is_work:
                metrics.requests_in_flight.dec()
            self._finish(record, is_work=is_work)

    def _finish(self, record: Record, *, is_work: bool) -> None:
        end = time.monotonic()
        segments = record.timeline.segments(end) if is_work else []
        seconds = end - record.timeline.start
        if is_work:
            _measure(record, segments, seconds)
        if record.span is not None and self._tracing is not None:
            self._tracing.finish(record, segments, end)
        if self._log_requests and not self._is_quiet(record):
            log.write(record, totals(segments), seconds)

    def _is_quiet(self, record: Record) -> bool:
        if record.path in self._unlogged:
            return True
        return record.path in _PROBES and record.outcome == "answered"


class _Answer:
    """Sends an answer on, with what is known of it by then."""

    def __init__(self, record: Record, send: Send, *, server_timing: bool) -> None:
        self._record = record
        self._send = send
        self._server_timing = server_timing
        self._streams = False
        self._has_begun = False
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._start(message)
        elif message["type"] == "http.response.body":
            message = self._body(message)
        await self._send(message)

    def _start(self, message: Message) -> Message:
        record = self._record
        record.status = message["status"]
        headers = [item for item in message.get("headers", ()) if item[0].lower() != _ID]
        headers.append((_ID, record.id.encode()))
        kind = dict(headers).get(b"content-type", b"")
        self._streams = kind.startswith(b"text/event-stream")
        if self._server_timing and not self._streams:
            headers.append((b"server-timing", server_timing(record.timeline).encode()))
        return {**message, "headers": headers}

    def _body(self, message: Message) -> Message:
        timeline = self._record.timeline
        if self._streams and not self._has_begun and timeline.began(Stage.GENERATE):
            self._has_begun = True
            timeline.begin_again(Stage.GENERATE, time.monotonic())
        if message.get("more_body"):
            return message
        self.complete = True
        if self._streams and self._server_timing:
            comment = f": server-timing {server_timing(timeline)}\n\n"
            return {**message, "body": message.get("body", b"") + comment.encode()}
        return message


def server_timing(timeline: Timeline) -> str:
    """The value of the header `Server-Timing` (W3C): milliseconds by stage, and in all."""
    now = time.monotonic()
    parts = [
        f"{stage};dur={seconds * 1e3:.1f}"
        for stage, seconds in totals(timeline.segments(now)).items()
    ]
    return ", ".join([*parts, f"total;dur={(now - timeline.start) * 1e3:.1f}"])


def _record(scope: Scope) -> Record:
    given = dict(scope["headers"]).get(_ID, b"").decode("latin-1")
    client = scope.get("client")
    return Record(
        id=given if _SAFE_ID.match(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"].removeprefix(scope.get("root_path", ""))[:_PATH_LENGTH],
        client=client[0] if client else None,
    )


def _measure(record: Record, segments: list[Segment], seconds: float) -> None:
    outcome = record.outcome
    metrics.requests.labels(outcome).inc()
    if record.left_in is not None:
        metrics.cancellations.labels(record.left_in).inc()
    elif record.status is not None and record.status >= _FAILED_STATUS:
        code = record.error_code
        metrics.refusals.labels(code if code in CODES else metrics.OTHER_CODE).inc()
    first = record.time_to_first_token()
    if outcome != "answered" or first is None:
        return
    for stage, value in totals(segments).items():
        metrics.request_stage.labels(stage).observe(value)
    images = "true" if record.images else "false"
    metrics.time_to_first_token.labels(images).observe(first)
    metrics.request_seconds.labels(images).observe(seconds)

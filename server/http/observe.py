"""Around the app: each request gets an id and a record; what it says becomes metrics, a header, a
line in the log and a trace.

The id is the client's `X-Request-Id`, or else a new one, and every answer names it. Stages of
requests that are answered whole are in the header `Server-Timing`, those of streams in a comment at
their end. Whatever goes wrong here is logged, and the request goes its way.
"""

import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import CODES
from server.telemetry import log, metrics, tracing
from server.telemetry import record as records
from server.telemetry.record import Record, Times
from server.telemetry.stages import Stage, Timeline

_log = logging.getLogger("saccade.observe")

_ID = b"x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,128}\Z")
_PATH_LENGTH = 200
_FAILED_STATUS = 400
# What is asked over and over by machines is logged only where it fails.
_PROBES = frozenset({"/health", "/ready", "/ping", "/load", "/metrics", "/version"})
# How an error begins that vLLM puts into a stream which has begun.
_STREAMED_ERRORS = (b'data: {"error"', b"event: error", b"event: response.failed")
_STREAMED_ERROR_CODE = "internal_error"

_REQUEST_STAGE = {stage: metrics.request_stage.labels(stage) for stage in Stage}


class Observed:
    """ASGI application around `app`. Only POST requests have stages, metrics and spans."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        root_path: str = "",
        routes: Iterable[str] = (),
        server_timing: bool,
        log_requests: bool,
        unlogged: Iterable[str] = (),
        traced: bool,
    ) -> None:
        """`routes` are paths that may name spans, `unlogged` those without a line in the log, all
        below `root_path`. With `traced`, the process has a tracer provider."""
        self._app = app
        self._root_path = root_path
        self._routes = frozenset(routes)
        self._server_timing = server_timing
        self._log_requests = log_requests
        self._unlogged = frozenset(unlogged)
        self._tracing = tracing.Tracing() if traced else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._record(scope)
        records.enter(record)
        is_work = record.method == "POST"
        scope = self._scope(scope, record, is_work=is_work)
        answer = _Answer(record, send, server_timing=self._server_timing and is_work)

        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not answer.has_ended:
                record.left_in = record.left_in or record.timeline.stage()
            return message

        if is_work:
            metrics.requests_in_flight.inc()
        try:
            await self._app(scope, hear, answer.send)
        finally:
            if is_work:
                metrics.requests_in_flight.dec()
            try:
                self._finish(record, answer.times, is_work=is_work)
            except Exception:
                _log.exception("a request could not be told of")

    def _record(self, scope: Scope) -> Record:
        given = next(iter(_ids(scope)), b"").decode("latin-1")
        path = scope["path"].removeprefix(self._root_path)[:_PATH_LENGTH]
        client = scope.get("client")
        return Record(
            id=given if _SAFE_ID.match(given) else uuid.uuid4().hex,
            method=scope["method"],
            path=path,
            route=path if path in self._routes else None,
            client=client[0] if client else None,
        )

    def _scope(self, scope: Scope, record: Record, *, is_work: bool) -> Scope:
        """`scope` with headers that tell the app of the record's id and span."""
        if _ids(scope) not in ([], [record.id.encode()]):
            kept = [item for item in scope["headers"] if item[0] != _ID]
            scope = {**scope, "headers": [*kept, (_ID, record.id.encode())]}
        if is_work:
            try:
                if self._tracing is not None:
                    return self._tracing.start(record, scope)
                record.trace_id = tracing.given_trace_id(scope)
            except Exception:
                _log.exception("a request could not be traced")
        return scope

    def _finish(self, record: Record, times: Times | None, *, is_work: bool) -> None:
        if times is None:
            times = Times.of(record.timeline, time.monotonic())
        if is_work:
            _measure(record, times)
        if record.span is not None and self._tracing is not None:
            self._tracing.finish(record, times)
        if self._log_requests and not self._is_quiet(record):
            log.write(record, times)

    def _is_quiet(self, record: Record) -> bool:
        if record.path in self._unlogged:
            return True
        return record.path in _PROBES and record.outcome == "answered"


def _ids(scope: Scope) -> list[bytes]:
    """The ids that a request was given: one, if its client knows what it does."""
    return [value for name, value in scope["headers"] if name == _ID]


class _Answer:
    """Sends an answer on, with what is known of it by then. `times` are those of a stream that has
    ended."""

    def __init__(self, record: Record, send: Send, *, server_timing: bool) -> None:
        self._record = record
        self._send = send
        self._server_timing = server_timing
        self._streams = False
        self._is_plain = True
        self._has_begun = False
        self.has_ended = False
        self.times: Times | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._start(message)
        elif message["type"] == "http.response.body":
            if self._streams:
                self._look_at(message.get("body", b""))
            if not message.get("more_body"):
                message = self._end(message)
        await self._send(message)

    def _start(self, message: Message) -> Message:
        record = self._record
        record.status = message["status"]
        headers = [item for item in message.get("headers", ()) if item[0].lower() != _ID]
        headers.append((_ID, record.id.encode()))
        known = dict(headers)
        self._streams = known.get(b"content-type", b"").startswith(b"text/event-stream")
        self._is_plain = b"content-encoding" not in known
        if self._server_timing and not self._streams:
            times = Times.of(record.timeline, time.monotonic())
            headers.append((b"server-timing", server_timing(times, record.timeline).encode()))
        return {**message, "headers": headers}

    def _look_at(self, body: bytes) -> None:
        """Note when the first piece of a stream leaves, and an error in it."""
        timeline = self._record.timeline
        if not self._has_begun and timeline.began(Stage.GENERATE):
            self._has_begun = True
            timeline.begin_again(Stage.GENERATE, time.monotonic())
        if body.startswith(_STREAMED_ERRORS):
            self._record.error_code = _STREAMED_ERROR_CODE

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


def server_timing(times: Times, timeline: Timeline) -> str:
    """The value of the header `Server-Timing` (W3C): milliseconds by stage, and in all."""
    parts = [f"{stage};dur={seconds * 1e3:.1f}" for stage, seconds in times.stages.items()]
    return ", ".join([*parts, f"total;dur={(times.end - timeline.start) * 1e3:.1f}"])


def _measure(record: Record, times: Times) -> None:
    outcome = record.outcome
    metrics.requests.labels(outcome).inc()
    if outcome == "cancelled":
        metrics.cancellations.labels(record.left_in).inc()
        return
    if outcome != "answered":
        code = record.error_code
        metrics.refusals.labels(code if code in CODES else metrics.OTHER_CODE).inc()
        return
    first = record.time_to_first_token()
    if first is None:  # no work of the engine
        return
    for stage, seconds in times.stages.items():
        _REQUEST_STAGE[stage].observe(seconds)
    images = "true" if record.images else "false"
    metrics.time_to_first_token.labels(images).observe(first)
    metrics.request_seconds.labels(images).observe(times.end - record.timeline.start)

"""The outermost layer: gives each request an id and a record, and answers when it fails.

The id is the client's `X-Request-Id`, or a new one, and is in every answer. After the answer was
sent, the record becomes metrics, a line in the log and a trace. The stages of a request are in the
header `Server-Timing` of an answer that is sent whole, and in a comment at the end of a stream.
A failure to record a request is logged and does not affect its answer.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import CODES
from server.http.answer import ID_HEADER, Answer
from server.http.client import Client
from server.http.scope import set_record
from server.telemetry import log, metrics, tracing
from server.telemetry.record import Record, Times
from server.telemetry.stages import Stage

_log = logging.getLogger("saccade.observe")

_SAFE_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,128}\Z")
_PATH_LENGTH = 200
# Machines request these all the time; they are logged only if they fail.
_PROBES = frozenset({"/health", "/ready", "/ping", "/load", "/metrics", "/version"})

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
        aborted: Iterable[str] = (),
    ) -> None:
        """`routes` are paths that may name spans, `unlogged` those without a line in the log, and
        `aborted` those whose work is cancelled when the client leaves; all below `root_path`. With
        `traced`, the process has a tracer provider."""
        self._app = app
        self._root_path = root_path
        self._routes = frozenset(routes)
        self._server_timing = server_timing
        self._log_requests = log_requests
        self._unlogged = frozenset(unlogged)
        self._aborted = frozenset(aborted)
        self._tracing = tracing.Tracing() if traced else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._record(scope)
        is_work = record.method == "POST"
        scope = self._scope(scope, record, is_work=is_work)
        answer = Answer(record, send, server_timing=self._server_timing and is_work)
        client = Client(receive, record, answer, aborts=record.path in self._aborted)
        if is_work:
            metrics.requests_in_flight.inc()
        try:
            await self._app(scope, client.receive, answer.send)
        except asyncio.CancelledError:
            if not client.forgive_cancelling():
                raise
        except Exception:
            if record.left_in is None:
                _log.exception("request %s failed: %s %s", record.id, record.method, record.path)
                await answer.fail()
        finally:
            client.stop_watching()
            if is_work:
                metrics.requests_in_flight.dec()
            try:
                self._finish(record, answer.times, is_work=is_work)
            except Exception:
                _log.exception("failed to record request %s", record.id)

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
        """`scope` with the record, and with headers that carry its id and its span."""
        scope = {**scope}
        set_record(scope, record)
        if _ids(scope) not in ([], [record.id.encode()]):
            kept = [item for item in scope["headers"] if item[0] != ID_HEADER]
            scope["headers"] = [*kept, (ID_HEADER, record.id.encode())]
        if is_work:
            try:
                if self._tracing is not None:
                    return self._tracing.start(record, scope)
                record.trace_id = tracing.given_trace_id(scope)
            except Exception:
                _log.exception("failed to trace a request")
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
    """All ids that the client gave the request, of which the first counts."""
    return [value for name, value in scope["headers"] if name == ID_HEADER]


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
    if first is None:  # the engine did nothing for it
        return
    for stage, seconds in times.stages.items():
        _REQUEST_STAGE[stage].observe(seconds)
    images = "true" if record.images else "false"
    metrics.time_to_first_token.labels(images).observe(first)
    metrics.request_seconds.labels(images).observe(times.end - record.timeline.start)

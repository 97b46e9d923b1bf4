"""The outermost layer: gives each request an id and a record, and answers when it fails.

The id is the client's `X-Request-Id`, or a new one, and is in every answer. After the answer was
sent, the record becomes metrics, a trace and, a moment later, a line in the log. The stages of a
request are in the header `Server-Timing` of an answer that is sent whole, and in a comment at the
end of a stream. A failure to record a request is logged and does not affect its answer.
"""

import asyncio
import logging
import re
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.concurrency import Turns
from server.errors import CODES, DeadlineExceeded, SaccadeError, ServerBusy, Unavailable
from server.http.answer import ID_HEADER, Answer, request_id
from server.http.client import Client
from server.http.errors import INTERNAL, as_clients
from server.http.scope import (
    Connection,
    item_of,
    set_connection,
    set_direct_send,
    set_receive,
    set_record,
    take_connection,
)
from server.telemetry import log, metrics, tracing
from server.telemetry.record import OUTCOMES, Record, Times
from server.telemetry.stages import Stage, Timeline

_log = logging.getLogger("saccade.observe")

_PATH_LENGTH = 200
# A client's own deadline in seconds, from the start of its request.
_TIMEOUT_HEADER = b"x-request-timeout"
_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
# Machines request these all the time; they are logged only if they fail.
_PROBES = frozenset({"/health", "/ready", "/ping", "/load", "/metrics", "/version"})

# So many requests begin in each iteration of the event loop, up to 1 ms each: when hundreds arrive
# together, probes and answers are served in between.
_BEGUN_AT_A_TIME = 8

_SHUTTING_DOWN = ServerBusy("the server is shutting down")
_ENGINE_DIED = Unavailable("the engine has died")
_REQUESTS = {outcome: metrics.requests.labels(outcome) for outcome in OUTCOMES}
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
        request_timeout_s: float | None = None,
        streams_directly: bool = True,
    ) -> None:
        """`routes` are paths that may name spans, `unlogged` those without a line in the log, and
        `aborted` those whose work is cancelled when the client leaves; all below `root_path`. With
        `traced`, the process has a tracer provider. `request_timeout_s` is the longest time
        that the work of `aborted` may take. With `streams_directly`, no layer in between
        reads or changes the body of a stream."""
        self._app = app
        self._root_path = root_path
        self._routes = frozenset(routes)
        self._server_timing = server_timing
        self._log = log.RequestLog() if log_requests else None
        self._unlogged = frozenset(unlogged)
        self._aborted = frozenset(aborted)
        self._request_timeout_s = request_timeout_s
        self._streams_directly = streams_directly
        self.turns = Turns(_BEGUN_AT_A_TIME)
        """Requests begin in turns."""
        self._tracing = tracing.Tracing() if traced else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = take_connection(scope)
        is_work = scope["method"] == "POST"
        came, came_ns = time.monotonic(), time.time_ns()
        was_cut = is_work and await self._is_cut_before_turn()
        record = self._record(scope, came, came_ns)
        scope = self._scope(scope, record, is_work=is_work)
        if connection is not None:
            set_connection(scope, connection)
        record.deadline = self._deadline(scope, record)
        answer = Answer(record, send, server_timing=self._server_timing and is_work)
        if self._streams_directly:
            set_direct_send(scope, answer.send)
        aborts = record.path in self._aborted
        client = Client(receive, record, answer, connection if aborts else None)
        receive = client.receive
        set_receive(scope, receive)
        if is_work:
            metrics.requests_in_flight.inc()
        try:
            if was_cut:
                raise asyncio.CancelledError
            await self._app(scope, receive, answer.send)
            if answer.was_cancelled:
                await answer.fail(_reason(connection))
        except asyncio.CancelledError:
            if not client.forgive_cancelling():
                await answer.fail(_reason(connection))
                if connection is None:  # else this is all that the task does
                    raise
        except Exception as error:
            if record.left_in is None and not client.is_late:
                _log.exception("request %s failed: %s %s", record.id, record.method, record.path)
                await answer.fail(as_clients(error) if answer.has_begun else INTERNAL)
        finally:
            client.stop_watching()
            if client.is_late:
                client.forgive_cancelling()  # the work may have taken it for the client's leaving
                await answer.fail(_exceeded(record, client.late_in))
            if is_work:
                metrics.requests_in_flight.dec()
            try:
                self._finish(record, answer.times, is_work=is_work)
            except Exception:
                _log.exception("failed to record request %s", record.id)

    async def _is_cut_before_turn(self) -> bool:
        """Wait for the request's turn: nothing was done for it yet that takes time. Returns whether
        it was cancelled meanwhile."""
        try:
            await self.turns.next()
        except asyncio.CancelledError:
            return True
        return False

    def _record(self, scope: Scope, came: float, came_ns: int) -> Record:
        path = scope["path"].removeprefix(self._root_path)[:_PATH_LENGTH]
        client = scope.get("client")
        return Record(
            id=request_id(scope["headers"]),
            method=scope["method"],
            path=path,
            route=path if path in self._routes else None,
            client=client[0] if client else None,
            background=item_of(scope) is not None,
            timeline=Timeline(came),
            epoch_ns=came_ns,
        )

    def _scope(self, scope: Scope, record: Record, *, is_work: bool) -> Scope:
        """`scope` with the record, and with headers that carry its id and its span."""
        scope = {**scope}
        set_record(scope, record)
        given = _ids(scope)
        if len(given) == 1 and given != [record.id.encode()]:  # several are refused (`headers.py`)
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

    def _deadline(self, scope: Scope, record: Record) -> float | None:
        """When the work has to end, on `time.monotonic()`; None: never. A batch has a window
        instead."""
        if record.background or record.path not in self._aborted:
            return None
        most = self._request_timeout_s
        for name, value in scope["headers"]:
            if name == _TIMEOUT_HEADER and _SECONDS.fullmatch(value):
                asked = float(value)
                most = asked if most is None else min(most, asked)
        return None if most is None else record.timeline.start + most

    def _finish(self, record: Record, times: Times | None, *, is_work: bool) -> None:
        if times is None:
            times = Times.of(record.timeline, time.monotonic())
        if is_work:
            _measure(record, times)
        if record.span is not None and self._tracing is not None:
            self._tracing.finish(record, times)
        if self._log is not None and not self._is_quiet(record):
            self._log.add(record, times)

    def flush(self) -> None:
        """Write what is not in the log yet, at the end."""
        if self._log is not None:
            self._log.flush()

    def _is_quiet(self, record: Record) -> bool:
        if record.path in self._unlogged:
            return True
        return record.path in _PROBES and record.outcome == "answered"


def _reason(connection: Connection | None) -> SaccadeError:
    """Why a request was cut off, whose client was still there."""
    died = connection is not None and connection.engine_has_died
    return _ENGINE_DIED if died else _SHUTTING_DOWN


def _exceeded(record: Record, stage: Stage | None) -> DeadlineExceeded:
    seconds = time.monotonic() - record.timeline.start
    return DeadlineExceeded(
        f"the request was not answered within {seconds:.3g} s, its deadline; "
        f"it was in the stage {stage}"
    )


def _ids(scope: Scope) -> list[bytes]:
    """All ids that the client gave the request, which may have one at most."""
    return [value for name, value in scope["headers"] if name == ID_HEADER]


def _measure(record: Record, times: Times) -> None:
    outcome = record.outcome
    _REQUESTS[outcome].inc()
    if outcome == "cancelled":
        metrics.cancellations.labels(record.left_in).inc()
        return
    if outcome != "answered":
        code = record.error_code
        metrics.refusals.labels(code if code in CODES else metrics.OTHER_CODE).inc()
        return
    first = record.time_to_first_token()
    if first is None or record.background:  # the engine did nothing for it, or nobody waits for it
        return
    for stage, seconds in times.stages.items():
        _REQUEST_STAGE[stage].observe(seconds)
    images = "true" if record.images else "false"
    metrics.time_to_first_token.labels(images).observe(first)
    metrics.request_seconds.labels(images).observe(times.end - record.timeline.start)

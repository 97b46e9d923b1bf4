"""OpenTelemetry spans of requests: one for the request, one for each segment of its stages.

The engine's option `--otlp-traces-endpoint` turns tracing on, and the engine sets up the exporter.
The engine's own spans join the trace, because it receives the request with our span as the parent.
Attribute names follow OpenTelemetry's semantic conventions for HTTP and generative AI.
"""

import functools
import threading
from collections.abc import Mapping, Sequence

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode
from starlette.types import Scope

from server import __version__
from server.telemetry.record import Record, Times

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_NO_CONTEXT = Context()
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Tracing:
    """Turns records into spans, with the tracer provider of the process.

    Stages become spans after the request has ended, and are handed to the provider's processor as
    finished spans: starting and ending each of them would take ten times as long.
    """

    def __init__(self) -> None:
        """Raises TypeError if there is no tracer provider of OpenTelemetry's SDK."""
        provider = trace.get_tracer_provider()
        if not isinstance(provider, TracerProvider):
            raise TypeError("the process has no tracer provider of OpenTelemetry's SDK")
        self._tracer = trace.get_tracer("saccade", __version__)
        self._scope = InstrumentationScope("saccade", __version__)
        self._provider = provider
        self._processor = provider._active_span_processor  # not public

    def start(self, record: Record, scope: Scope) -> Scope:
        """Start the request's span, in the trace that its headers name; returns `scope` with
        headers that name the span as the parent, if it is sampled: else the engine has nothing to
        trace (`is_untraced`)."""
        given = _context_headers(scope)
        record.span = self._tracer.start_span(
            record.method,
            context=propagate.extract(given) if given else _NO_CONTEXT,
            kind=SpanKind.SERVER,
            start_time=record.epoch_ns,
        )
        record.trace_id = _trace_id(record.span.get_span_context())
        if is_untraced(record):
            return scope
        carried: dict[str, str] = {}
        propagate.inject(carried, trace.set_span_in_context(record.span))
        kept = [item for item in scope["headers"] if item[0].lower() not in _CONTEXT_HEADERS]
        added = [(name.encode(), value.encode("latin-1")) for name, value in carried.items()]
        return {**scope, "headers": kept + added}

    def finish(self, record: Record, times: Times) -> None:
        """End the request's span; its stages and images become child spans."""
        span = record.span
        if not span.is_recording():
            span.end()
            return
        if record.route is not None:  # any other path is arbitrary text
            span.update_name(f"{record.method} {record.route}")
        span.set_attributes(_attributes(record))
        if record.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR, record.error_code))
        shown = [(segment.stage.value, segment) for segment in times.segments]
        if record.images > 1:  # the segments of a single image equal the stages
            images = record.timeline.image_segments(times.end)
            shown += [(f"image {segment.stage}", segment) for segment in images]
        for name, segment in shown:
            self._add(name, span, record.epoch(segment.start), record.epoch(segment.end))
        span.end(record.epoch(times.end))

    def _add(self, name: str, parent: trace.Span, start_ns: int, end_ns: int) -> None:
        above = parent.get_span_context()
        context = SpanContext(
            above.trace_id,
            self._provider.id_generator.generate_span_id(),
            is_remote=False,
            trace_flags=above.trace_flags,
            trace_state=above.trace_state,
        )
        child = ReadableSpan(
            name,
            context,
            parent=above,
            resource=self._provider.resource,
            instrumentation_scope=self._scope,
            start_time=start_ns,
            end_time=end_ns,
        )
        self._processor.on_end(child)


def close(timeout_s: float) -> None:
    """Send the remaining spans for at most `timeout_s` seconds, then drop the rest. Blocks.

    The SDK alone would wait up to half a minute at the end of the process for a collector that is
    down.
    """
    shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)
    if shutdown is not None:  # otherwise, nothing was traced
        closing = threading.Thread(target=shutdown, daemon=True)
        closing.start()
        closing.join(timeout_s)


def given_trace_id(scope: Scope) -> str | None:
    """The trace id in a request's headers, for a server that does not trace; None without one."""
    given = _context_headers(scope)
    context = propagate.extract(given) if given else None
    return _trace_id(trace.get_current_span(context).get_span_context())


def is_untraced(record: Record) -> bool:
    """Whether the request has a span that is not sampled."""
    return record.span is not None and not record.span.get_span_context().trace_flags.sampled


def _context_headers(scope: Scope) -> dict[str, str]:
    """The trace context in a request's headers; repeated ones are joined (RFC 9110, 5.3)."""
    given: dict[str, str] = {}
    fields = _fields_of(propagate.get_global_textmap())
    for raw, value in scope["headers"]:
        if raw in fields:
            name, text = raw.decode("latin-1"), value.decode("latin-1")
            given[name] = f"{given[name]},{text}" if name in given else text
    return given


@functools.cache
def _fields_of(propagator: TextMapPropagator) -> frozenset[bytes]:
    """The names of the headers that `propagator` reads. It makes the set anew each time."""
    return frozenset(field.encode("latin-1") for field in propagator.fields)


def _trace_id(context: SpanContext) -> str | None:
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def _attributes(record: Record) -> Mapping[str, str | int | float | Sequence[str]]:
    found: dict[str, str | int | float | Sequence[str] | None] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "http.route": record.route,
        "url.path": record.path,
        "client.address": record.client,
        "error.type": record.error_code,
        "gen_ai.operation.name": _OPERATIONS.get(record.route or ""),
        "gen_ai.provider.name": "saccade" if record.model else None,
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": (
            (record.finish_reason,) if record.finish_reason else None
        ),
        "gen_ai.usage.input_tokens": record.prompt_tokens or None,
        "gen_ai.usage.output_tokens": record.completion_tokens or None,
        "gen_ai.response.time_to_first_chunk": record.time_to_first_token(),
        "saccade.request.id": record.id,
        "saccade.outcome": record.outcome,
        "saccade.key_group": record.key_group,
        "saccade.images": record.images,
        "saccade.image_tokens": record.image_tokens,
        "saccade.cancelled_in": record.left_in,
    }
    return {name: value for name, value in found.items() if value is not None}

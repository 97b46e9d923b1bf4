"""A real OTLP receiver on loopback (gRPC) that stores the spans it receives."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Event:
    name: str
    time_ns: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """Ids in hex, `parent_id` empty for a root; times since the epoch; `kind` as in OTLP: INTERNAL,
    SERVER, CLIENT; `status`: UNSET, OK, ERROR."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    events: tuple[Event, ...]
    resource: Mapping[str, Any]
    scope: str
    status: str
    status_message: str

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


Spans = list[Span]


class Receiver(TraceServiceServicer):
    """Stores spans in the order of arrival; a span is exported when it has ended."""

    def __init__(self) -> None:
        self.endpoint = ""
        """For `--otlp-traces-endpoint` and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT."""
        self._spans: Spans = []
        self._metadata: dict[str, str] = {}
        self._changed = threading.Condition()

    @property
    def spans(self) -> Spans:
        with self._changed:
            return list(self._spans)

    @property
    def metadata(self) -> dict[str, str]:
        """The headers of the last export."""
        with self._changed:
            return dict(self._metadata)

    def clear(self) -> None:
        with self._changed:
            self._spans.clear()

    def wait_for(self, predicate: Callable[[Spans], bool], timeout: float = TIMEOUT_S) -> Spans:
        """All spans, as soon as `predicate` is true for them. Raises AssertionError on
        timeout."""
        with self._changed:
            done = self._changed.wait_for(lambda: predicate(list(self._spans)), timeout)
            names = [span.name for span in self._spans]
            assert done, f"after {timeout} s there are {len(names)} spans: {names}"
            return list(self._spans)

    def wait_for_names(self, *names: str, timeout: float = TIMEOUT_S) -> Spans:
        """All spans, as soon as there is one of each name."""
        return self.wait_for(lambda spans: set(names) <= {span.name for span in spans}, timeout)

    def Export(
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        with self._changed:
            self._spans += _spans(request)
            self._metadata = {key: str(value) for key, value in context.invocation_metadata()}
            self._changed.notify_all()
        return ExportTraceServiceResponse()


@contextlib.contextmanager
def receiver() -> Iterator[Receiver]:
    """A receiver on a free port."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    received = Receiver()
    add_TraceServiceServicer_to_server(received, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    received.endpoint = f"http://127.0.0.1:{port}"
    try:
        yield received
    finally:
        server.stop(grace=None).wait()


def children(spans: Iterable[Span], parent: Span) -> Spans:
    """The children of `parent`, in the order in which they started."""
    found = [
        span
        for span in spans
        if (span.trace_id, span.parent_id) == (parent.trace_id, parent.span_id)
    ]
    return sorted(found, key=lambda span: span.start_ns)


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for of_resource in request.resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield _span(span, resource, of_scope.scope.name)


def _span(span: trace_pb2.Span, resource: Mapping[str, Any], scope: str) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(
            Event(event.name, event.time_unix_nano, _attributes(event.attributes))
            for event in span.events
        ),
        resource=resource,
        scope=scope,
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
    )


def _attributes(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [_value(each) for each in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case kind:
            return getattr(value, kind)

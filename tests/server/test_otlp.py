"""The tests' OTLP receiver gets the spans that the OpenTelemetry SDK sends."""

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from tests.otlp import children, receiver


def test_spans_arrive_unchanged() -> None:
    with receiver() as received:
        provider = TracerProvider(resource=Resource({"service.name": "saccade"}))
        exporter = OTLPSpanExporter(received.endpoint, insecure=True, headers={"x-key": "secret"})
        provider.add_span_processor(BatchSpanProcessor(exporter))
        tracer = provider.get_tracer("saccade.test")
        with tracer.start_as_current_span("request", kind=SpanKind.SERVER) as request:
            request.set_attributes({"text": "é", "whole": 3, "part": 0.5, "yes": True, "all": [1]})
            tracer.start_span("decode", start_time=2_000_000_000).end(2_500_000_000)
            with tracer.start_as_current_span("fetch", start_time=1_000_000_000) as fetch:
                fetch.add_event("retry", {"number": 1}, timestamp=7)
                fetch.set_status(Status(StatusCode.ERROR, "no route"))
        provider.shutdown()
        spans = received.wait_for_names("request", "decode", "fetch")
        assert received.metadata["x-key"] == "secret"
        received.clear()
        assert not received.spans
    assert {(span.scope, span.resource["service.name"]) for span in spans} == {
        ("saccade.test", "saccade")
    }
    root = next(span for span in spans if span.name == "request")
    context = request.get_span_context()
    assert root.trace_id == f"{context.trace_id:032x}"
    assert root.span_id == f"{context.span_id:016x}"
    assert (root.parent_id, root.kind, root.status) == ("", "SERVER", "UNSET")
    assert root.attributes == {"text": "é", "whole": 3, "part": 0.5, "yes": True, "all": [1]}
    assert root.start_ns < root.end_ns
    first, second = children(spans, root)
    assert (first.name, first.kind, first.start_ns) == ("fetch", "INTERNAL", 1_000_000_000)
    assert (first.status, first.status_message) == ("ERROR", "no route")
    (event,) = first.events
    assert (event.name, event.time_ns, event.attributes) == ("retry", 7, {"number": 1})
    assert (second.name, second.seconds) == ("decode", 0.5)


def test_waiting_for_missing_spans_fails() -> None:
    with receiver() as received, pytest.raises(AssertionError, match="0 spans"):
        received.wait_for(bool, timeout=0.01)

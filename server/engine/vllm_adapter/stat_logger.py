"""vLLM's metrics with our classes: it observes about twenty values of each request and sets or adds
as many with each step of the engine, on the event loop."""

from vllm.v1.metrics.loggers import PrometheusStatLogger

from server.telemetry.counters import Counter, Gauge
from server.telemetry.histogram import Histogram


def register() -> None:
    """Let the engine that is made next use our classes."""
    PrometheusStatLogger._histogram_cls = Histogram
    PrometheusStatLogger._counter_cls = Counter
    PrometheusStatLogger._gauge_cls = Gauge

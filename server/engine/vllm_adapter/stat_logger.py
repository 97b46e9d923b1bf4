"""vLLM's metrics with our histograms: it observes about twenty values of each request, on the event
loop."""

from vllm.v1.metrics.loggers import PrometheusStatLogger

from server.telemetry.histogram import Histogram


def register() -> None:
    """Let the engine that is made next use our histograms."""
    PrometheusStatLogger._histogram_cls = Histogram

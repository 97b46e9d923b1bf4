"""Light counters and gauges are exposed as Prometheus's are."""

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

import server.telemetry.metrics  # noqa: F401  - turns off the times at which series are created
from server.telemetry import counters


@pytest.mark.parametrize("labels", [(), ("engine", "reason")])
def test_they_are_exposed_as_prometheus_ones(labels: tuple[str, ...]) -> None:
    pages = []
    for kind in (prometheus_client, counters):
        registry = CollectorRegistry()
        counter = kind.Counter("done_total", "Done.", labels, registry=registry)
        gauge = kind.Gauge("running", "Running.", labels, registry=registry)
        for amounts in ((1, 0, 2.5), (0,)):
            values = [f"{name}{len(amounts)}" for name in labels]
            for amount in amounts:
                (counter.labels(*values) if labels else counter).inc(amount)
            (gauge.labels(*values) if labels else gauge).set(len(amounts))
        if labels:
            counter.labels(engine="named", reason="x").inc()
        pages.append(generate_latest(registry).decode())
    assert pages[0] == pages[1]
    assert "done_total" in pages[0]


def test_a_child_is_found_again() -> None:
    registry = CollectorRegistry()
    counter = counters.Counter("done_total", "Done.", ("engine",), registry=registry)
    counter.labels("0").inc()
    counter.labels(engine="0").inc(2)
    assert counter.labels("0") is counter.labels("0")
    assert registry.get_sample_value("done_total", {"engine": "0"}) == 3

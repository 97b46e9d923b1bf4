"""The histogram of requests writes what that of prometheus_client writes."""

import math

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

import server.telemetry.metrics  # noqa: F401  - turns off the times at which series are created
from server.telemetry.histogram import Histogram

# At a bound, between two, below the first and above the last.
VALUES = (0.5, 0.7, 1.0, 0.0, -1.0, 2.5, 1e9, 3, math.inf)


@pytest.mark.parametrize("buckets", [(0.5, 1, 2.5), (-1.0, 0.0, 1.0), (1.0, math.inf)])
def test_the_same_observations_give_the_same_metrics(buckets: tuple[float, ...]) -> None:
    written = []
    for kind in (prometheus_client.Histogram, Histogram):
        registry = CollectorRegistry()
        plain = kind("plain", "Without labels.", buckets=buckets, registry=registry)
        labelled = kind("labelled", "With one.", ["of"], buckets=buckets, registry=registry)
        for value in VALUES:
            plain.observe(value)
            labelled.labels("a").observe(2 * value)
        labelled.labels("never observed")
        written.append(generate_latest(registry).decode())
    assert written[0].count("_bucket") >= 3 * len(buckets)
    assert written[0] == written[1]

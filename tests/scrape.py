"""The values of /metrics."""

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families

# Scrapes within a second of each other share a page, unless they ask for a new one.
FRESH = {"Cache-Control": "no-cache"}

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(http: httpx.Client) -> Series:
    """Every series: (name, sorted labels) -> value."""
    text = http.get("/metrics", headers=FRESH).raise_for_status().text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    """Raises KeyError if there is no such series."""
    return series[name, tuple(sorted(labels.items()))]


def rises(
    http: httpx.Client,
    before: Series,
    name: str,
    by: float = 1,
    timeout_s: float = 20,
    **labels: str,
) -> Series:
    """Wait until a series has risen by `by`; returns all series."""
    wanted = value(before, name, **labels) + by
    return wait_for(http, lambda now: value(now, name, **labels) >= wanted, timeout_s)


def ended_early(http: httpx.Client, before: Series) -> bool:
    """Wait for the end of a request; returns whether its client left during generation."""

    def rise(now: Series, name: str, **labels: str) -> float:
        return value(now, name, **labels) - value(before, name, **labels)

    def left(now: Series) -> float:
        return rise(now, "saccade_cancellations_total", stage="generate")

    def over(now: Series) -> bool:
        return left(now) + rise(now, "saccade_requests_total", outcome="answered") >= 1

    return left(wait_for(http, over, 60)) >= 1


def wait_for(
    http: httpx.Client,
    holds: Callable[[Series], bool],
    timeout_s: float = 20,
    pause_s: float = 0.05,
) -> Series:
    """Scrape until `holds` is true; raises AssertionError on timeout."""
    deadline = time.monotonic() + timeout_s
    while not holds(series := scrape(http)):
        assert time.monotonic() < deadline, "the metrics did not reach the expected values"
        time.sleep(pause_s)
    return series

"""Counters and gauges of Prometheus for what changes with every step of the engine."""

from typing import Any, Self

import prometheus_client
from prometheus_client.metrics import MetricWrapperBase


class KnownLabels(MetricWrapperBase):
    """A metric that finds those for values of its labels in a third of the time. It is never
    cleared."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._known: dict[tuple[Any, ...], Self] = {}
        super().__init__(*args, **options)

    def labels(self, *values: Any, **named: Any) -> Self:
        """The metric for these values of its labels."""
        found = self._known.get(values)
        if found is None or named:
            found = super().labels(*values, **named)
            if not named:
                self._known[values] = found
        return found


class Counter(KnownLabels, prometheus_client.Counter):
    """Prometheus's, at a third of its cost: amounts are not checked, and 0 is not added. It has no
    exemplars."""

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        """Add `amount`; of a counter with labels, call it on what `labels` returns."""
        if amount:
            self._value.inc(amount)


class Gauge(prometheus_client.Gauge):
    """Prometheus's, for values that are set in one process."""

    def set(self, value: float) -> None:
        """Set it; of a gauge with labels, call it on what `labels` returns."""
        self._value.set(float(value))

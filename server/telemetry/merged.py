"""The metrics of several front ends as those of one server.

What is counted is added up, also what was known of a front end that has ended, since a sum that
falls would look like a restart of the whole server. A gauge is added up too, unless it tells the
same in all front ends.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

_COUNTED = frozenset({"counter", "histogram", "summary"})
# Gauges that are the same in all, or of which one value counts.
_GREATEST = frozenset({"saccade_devices", "python_info"})
_LEAST = frozenset({"saccade_ready", "saccade_image_worker_sandbox", "process_start_time_seconds"})
# Counts of the engines, which each front end gets.
_OF_ENGINES = "saccade_embedding_cache_"
# Of vLLM's gauges, the engines' last report counts, which only one front end has got.
_OF_VLLM = "vllm:"


class Family(msgspec.Struct, array_like=True):
    """A metric with its samples: (name, labels, value)."""

    name: str
    type: str
    documentation: str
    samples: list[tuple[str, tuple[tuple[str, str], ...], float]]


class Page(msgspec.Struct, array_like=True):
    """What a front end says.

    Attributes:
        generation: how often it was started again.
        updated: when it got the last statistics of each engine, on the monotonic clock.
    """

    generation: int
    updated: dict[str, float]
    families: list[Family]


def families(metrics: Iterable[Metric]) -> list[Family]:
    """`metrics` to be sent to another process."""
    return [
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            [
                (sample.name, tuple(sorted(sample.labels.items())), float(sample.value))
                for sample in metric.samples
            ],
        )
        for metric in metrics
    ]


class Past:
    """The last pages of front ends that have ended, reduced to what is counted."""

    def __init__(self) -> None:
        self._last: dict[int, Page] = {}
        self._ended: list[Page] = []

    def with_known(self, pages: Mapping[int, Page]) -> list[Page]:
        """`pages`, by front end, and those of the past. One that does not answer is there as it
        was."""
        for index, page in pages.items():
            before = self._last.get(index)
            if before is not None and before.generation != page.generation:
                self._ended.append(_counted(before))
            self._last[index] = page
        silent = [_counted(page) for index, page in self._last.items() if index not in pages]
        return [*pages.values(), *silent, *self._ended]


def _counted(page: Page) -> Page:
    kept = [each for each in page.families if each.type in _COUNTED]
    return Page(page.generation, {}, kept)


class _Value(NamedTuple):
    value: float
    updated: float


class Whole(Collector):
    """The metrics of all pages together."""

    def __init__(self, pages: list[Page], running: int, restarts: int) -> None:
        """`running` front ends have answered; they were started again `restarts` times."""
        self._pages = pages
        self._running = running
        self._restarts = restarts
        self._metrics = list(self._joined())

    def collect(self) -> Iterable[Metric]:
        return self._metrics

    def _joined(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], _Value]] = {}
        for page in self._pages:
            for family in page.families:
                found.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                into = values.setdefault(family.name, {})
                for name, labels, value in family.samples:
                    updated = page.updated.get(dict(labels).get("engine", ""), 0.0)
                    before, new = into.get((name, labels)), _Value(value, updated)
                    into[name, labels] = new if before is None else _joined(family, before, new)
        for family_name, metric in found.items():
            for (name, labels), (value, _) in values[family_name].items():
                metric.add_sample(name, dict(labels), value)
            yield metric
        yield GaugeMetricFamily(
            "saccade_front_ends", "Front ends that answer.", value=self._running
        )
        yield CounterMetricFamily(
            "saccade_front_end_restarts",
            "Front ends that have ended by themselves and were started again.",
            value=self._restarts,
        )


def _joined(family: Family, one: _Value, other: _Value) -> _Value:
    name, kind = family.name, family.type
    if kind == "info" or name in _GREATEST or name.startswith(_OF_ENGINES):
        return max(one, other)
    if name in _LEAST:
        return min(one, other)
    if kind == "gauge" and name.startswith(_OF_VLLM):
        return max(one, other, key=lambda each: each.updated)
    return _Value(one.value + other.value, 0.0)

"""Every metric of Saccade's own, on the registry that vLLM's `/metrics` shows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

# Upper bounds of the histograms of the embedding cache, in seconds; filled in the engine process.
EMBEDDING_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

image_decode = Histogram(
    "saccade_image_decode_seconds", "Decoding one image in a worker.", buckets=_STAGE_BUCKETS
)
image_preprocess = Histogram(
    "saccade_image_preprocess_seconds",
    "The model's image processor for one image in a worker.",
    buckets=_STAGE_BUCKETS,
)
image_queue = Gauge("saccade_image_queue", "Images that wait for a worker.")
image_worker_deaths = Counter("saccade_image_worker_deaths_total", "Image workers that died.")
images_dropped = Counter(
    "saccade_images_dropped_total", "Waiting images dropped because their callers had left."
)
image_lookups = Counter(
    "saccade_image_lookups_total",
    "Images looked up in the feature cache before decoding.",
    ["result"],
)
images_joined = Counter(
    "saccade_images_joined_total", "Images that were being processed already for another request."
)
features_evicted = Counter(
    "saccade_features_evicted_total", "Images whose features left the feature cache for others."
)
fetch_cache_requests = Counter(
    "saccade_fetch_cache_requests_total",
    "Images served by the fetcher with its cache: hit (no request), revalidated (confirmed by the "
    "image's server), miss (fetched and kept), bypass (fetched, and not to be kept).",
    ["result"],
)
fetch_cache_bytes = Gauge("saccade_fetch_cache_bytes", "Bytes of the fetched images that are kept.")
files = Gauge("saccade_files", "Uploaded files that are kept.")
file_bytes = Gauge("saccade_file_bytes", "Bytes of uploaded files on the disk.")


@contextmanager
def embedding_cache(snapshots: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Show what the embedding caches of the engines report, for as long as this lasts."""
    collector = EmbeddingCacheCollector(snapshots)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


_PREFIX = "saccade_embedding_cache_"
_COUNTS = {
    "hits": "Images whose embeddings the tier had.",
    "misses": "Images whose embeddings the tier did not have.",
    "evictions": "Images whose embeddings left the tier for others.",
    "errors": "Reads and writes of the tier that failed, and damaged entries.",
    "dropped": "Images that were not written to the tier, since too many waited for it.",
}


class EmbeddingCacheCollector(Collector):
    """Metrics of the embedding cache by tier, summed over the engines, from their last reports:
    engine -> tier -> counts, and `seconds`: operation -> counts by bucket and the sum."""

    def __init__(self, snapshots: Mapping[Any, Mapping[str, Any]]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        reports = list(self._snapshots.values())
        tiers = sorted({tier for report in reports for tier in report})
        for name, text in _COUNTS.items():
            counter = CounterMetricFamily(_PREFIX + name, text, labels=["tier"])
            for tier in tiers:
                counter.add_metric([tier], sum(r[tier][name] for r in reports if tier in r))
            yield counter
        gauge = GaugeMetricFamily(_PREFIX + "bytes", "Bytes of embeddings held.", labels=["tier"])
        for tier in tiers:
            sizes = [r[tier].get("bytes") for r in reports if tier in r]
            if None not in sizes:
                # The engines share what is below their own memory.
                gauge.add_metric([tier], sum(sizes) if tier in ("gpu", "host") else max(sizes))
        yield gauge
        seconds = HistogramMetricFamily(
            _PREFIX + "seconds", "Reading or writing one image's embeddings in a tier.",
            labels=["tier", "operation"],
        )  # fmt: skip
        for tier in tiers:
            rows = [r[tier]["seconds"] for r in reports if tier in r]
            for operation in sorted({operation for row in rows for operation in row}):
                found = [row[operation] for row in rows if operation in row]
                *counts, total = (sum(column) for column in zip(*found, strict=True))
                seconds.add_metric([tier, operation], _buckets(counts), total)
        yield seconds


def _buckets(counts: list[float]) -> list[tuple[str, float]]:
    """Cumulative counts by their upper bounds, as Prometheus has them."""
    bounds = [*map(str, EMBEDDING_SECONDS), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))

"""Every metric of Saccade's own, on the registry that vLLM's `/metrics` shows.

Labels come from closed sets, and each of their values is there from the start: a rate does not see
the step from nothing to one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from prometheus_client import (
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.errors import CODES
from server.telemetry.record import OUTCOMES
from server.telemetry.stages import Stage

# When each series was made: it lengthens a scrape, and no query asks for it.
disable_created_metrics()  # type: ignore[no-untyped-call]

# The values of labels that are not an enumeration elsewhere.
SOURCES = ("http", "data", "file", "stored")
CAPS = ("none", "server", "request", "image")
OTHER_CODE = "other"

# Upper bounds of the histograms of the embedding cache, in seconds; filled in the engine process.
EMBEDDING_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_BUCKETS = (*_STAGE_BUCKETS, 30, 60)
_LONG_BUCKETS = (*_REQUEST_BUCKETS, 120, 300)
_BYTE_BUCKETS = tuple(4.0**n for n in range(5, 15))  # 1 KiB to 256 MiB
_PIXEL_BUCKETS = (1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 3.2e7, 1e8)
_TOKEN_BUCKETS = tuple(2.0**n for n in range(4, 16))  # 16 to 32768

# ---------------------------------------------------------------------- requests

requests = Counter("saccade_requests_total", "Requests by how they ended.", ["outcome"])
requests_in_flight = Gauge("saccade_requests_in_flight", "Requests that are being answered.")
refusals = Counter("saccade_refusals_total", "Errors that were answered, by their code.", ["code"])
cancellations = Counter(
    "saccade_cancellations_total", "Clients that left before their answer, by stage.", ["stage"]
)
request_stage = Histogram(
    "saccade_request_stage_seconds",
    "Time of an answered request in one stage; the stages of a request add up to its duration.",
    ["stage"],
    buckets=_REQUEST_BUCKETS,
)
time_to_first_token = Histogram(
    "saccade_time_to_first_token_seconds",
    "From the first byte of a request to the first piece of its answer.",
    ["images"],
    buckets=_REQUEST_BUCKETS,
)
request_seconds = Histogram(
    "saccade_request_seconds",
    "From the first byte of a request to the last of its answer.",
    ["images"],
    buckets=_LONG_BUCKETS,
)
ready = Gauge("saccade_ready", "1 while requests can be served, as /ready says.")
build = Info("saccade_build", "Versions, and what is served on what.")
devices = Gauge("saccade_devices", "Accelerators that the engine uses; on a CPU its processes.")

# ---------------------------------------------------------------------- images

image_fetch = Histogram(
    "saccade_image_fetch_seconds",
    "Loading one image or file, by where it was; also where that failed.",
    ["source"],
    buckets=_STAGE_BUCKETS,
)
image_queue_wait = Histogram(
    "saccade_image_queue_wait_seconds", "Waiting for a worker.", buckets=_STAGE_BUCKETS
)
image_decode = Histogram(
    "saccade_image_decode_seconds", "Decoding one image in a worker.", buckets=_STAGE_BUCKETS
)
image_preprocess = Histogram(
    "saccade_image_preprocess_seconds",
    "The model's image processor for one image in a worker.",
    buckets=_STAGE_BUCKETS,
)
image_bytes = Histogram(
    "saccade_image_bytes", "Bytes of one image file as it came.", buckets=_BYTE_BUCKETS
)
image_pixels = Histogram(
    "saccade_image_pixels", "Pixels of one image as it came.", buckets=_PIXEL_BUCKETS
)
image_tokens = Histogram(
    "saccade_image_tokens",
    "Tokens of one image in a prompt, by the cap that lowered them.",
    ["cap"],
    buckets=_TOKEN_BUCKETS,
)

# ---------------------------------------------------------------------- image workers

image_workers = Gauge("saccade_image_workers", "Image workers that there should be.")
image_workers_up = Gauge("saccade_image_workers_up", "Image workers that can take work.")
image_workers_busy = Gauge("saccade_image_workers_busy", "Image workers at work.")
image_queue = Gauge("saccade_image_queue", "Images that wait for a worker.")
image_queue_limit = Gauge("saccade_image_queue_limit", "Images that may wait for a worker.")
image_worker_deaths = Counter("saccade_image_worker_deaths_total", "Image workers that died.")
image_worker_restarts = Counter(
    "saccade_image_worker_restarts_total", "Image workers that were started in the place of others."
)
images_dropped = Counter(
    "saccade_images_dropped_total", "Images dropped or stopped because their callers had left."
)

# ---------------------------------------------------------------------- caches and files

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
features_bytes = Gauge("saccade_features_bytes", "Bytes of images' features that the engine holds.")
fetch_cache_requests = Counter(
    "saccade_fetch_cache_requests_total",
    "Images served by the fetcher with its cache: hit (no request), revalidated (confirmed by the "
    "image's server), miss (fetched and kept), bypass (fetched, and not to be kept).",
    ["result"],
)
fetch_cache_bytes = Gauge("saccade_fetch_cache_bytes", "Bytes of the fetched images that are kept.")
files = Gauge("saccade_files", "Uploaded files that are kept.")
file_bytes = Gauge("saccade_file_bytes", "Bytes of uploaded files on the disk.")

for _metric, _values in (
    (requests, OUTCOMES),
    (refusals, (*sorted(CODES), OTHER_CODE)),
    (cancellations, Stage),
    (request_stage, Stage),
    (time_to_first_token, ("true", "false")),
    (request_seconds, ("true", "false")),
    (image_fetch, SOURCES),
    (image_tokens, CAPS),
    (image_lookups, ("hit", "miss")),
    (fetch_cache_requests, ("hit", "revalidated", "miss", "bypass")),
):
    for _value in _values:
        _metric.labels(_value)


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

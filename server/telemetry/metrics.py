"""All of Saccade's own metrics, on the registry that vLLM's `/metrics` exposes.

Labels come from closed sets, and every series exists from the start: `rate` misses the step from an
absent series to 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from prometheus_client import (
    REGISTRY,
    Counter,
    Gauge,
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
from server.telemetry.histogram import Histogram
from server.telemetry.record import OUTCOMES
from server.telemetry.stages import Stage

# The time at which each series was created lengthens a scrape, and no query uses it.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Values of labels that are not enumerated elsewhere.
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

requests = Counter("saccade_requests_total", "Requests by outcome.", ["outcome"])
requests_in_flight = Gauge("saccade_requests_in_flight", "Requests in progress.")
requests_running = Gauge("saccade_requests_running", "Requests that have a permit to work.")
requests_waiting = Gauge("saccade_requests_waiting", "Requests that wait for a permit to work.")
admission_wait = Histogram(
    "saccade_admission_wait_seconds",
    "Time that a request waited for its permit, of those that had to wait.",
    buckets=_LONG_BUCKETS,
)
# What is limited over all requests.
RESOURCES = ("body_bytes", "media_bytes", "image_tokens", "decode_pixels")
admission_held = Gauge(
    "saccade_admission_held", "What requests in progress hold of a limited resource.", ["resource"]
)
admission_limit = Gauge(
    "saccade_admission_limit", "The limit of what requests in progress may hold.", ["resource"]
)
refusals = Counter(
    "saccade_refusals_total", "Requests that were answered with an error, by its code.", ["code"]
)
cancellations = Counter(
    "saccade_cancellations_total",
    "Requests whose client left before the end of the answer, by stage.",
    ["stage"],
)
request_stage = Histogram(
    "saccade_request_stage_seconds",
    "Time of an answered request in each stage; the stages of a request add up to its duration.",
    ["stage"],
    buckets=_REQUEST_BUCKETS,
)
time_to_first_token = Histogram(
    "saccade_time_to_first_token_seconds",
    "Time from the first byte of a request to the first chunk of its answer.",
    ["images"],
    buckets=_REQUEST_BUCKETS,
)
request_seconds = Histogram(
    "saccade_request_seconds",
    "Time from the first byte of a request to the last byte of its answer.",
    ["images"],
    buckets=_LONG_BUCKETS,
)
ready = Gauge("saccade_ready", "1 while the server is ready, as /ready reports.")
build = Info("saccade_build", "Versions, device and model.")
engine_restarts = Counter(
    "saccade_engine_restarts_total", "How often the engine was started again after it had died."
)
devices = Gauge("saccade_devices", "Accelerators used by the engine; on a CPU, its processes.")

# ---------------------------------------------------------------------- images

image_fetch = Histogram(
    "saccade_image_fetch_seconds",
    "Time to load one image or file, by source; includes failed loads.",
    ["source"],
    buckets=_STAGE_BUCKETS,
)
image_queue_wait = Histogram(
    "saccade_image_queue_wait_seconds",
    "Time that one image waited for a worker.",
    buckets=_STAGE_BUCKETS,
)
image_decode = Histogram(
    "saccade_image_decode_seconds", "Time to decode one image in a worker.", buckets=_STAGE_BUCKETS
)
image_preprocess = Histogram(
    "saccade_image_preprocess_seconds",
    "Time of the model's image processor for one image in a worker.",
    buckets=_STAGE_BUCKETS,
)
video_decode = Histogram(
    "saccade_video_decode_seconds",
    "Time of decoding the frames of one video.",
    buckets=_LONG_BUCKETS,
)
video_preprocess = Histogram(
    "saccade_video_preprocess_seconds",
    "Time in the model's processor for one video.",
    buckets=_LONG_BUCKETS,
)
video_tokens = Histogram(
    "saccade_video_tokens", "Tokens of each video in a prompt.", buckets=_TOKEN_BUCKETS
)
video_frames = Histogram(
    "saccade_video_frames",
    "Frames of each video in a prompt.",
    buckets=tuple(2.0**n for n in range(11)),
)
image_bytes = Histogram(
    "saccade_image_bytes", "Bytes of one image file as received.", buckets=_BYTE_BUCKETS
)
image_pixels = Histogram(
    "saccade_image_pixels", "Pixels of one image as received.", buckets=_PIXEL_BUCKETS
)
image_tokens = Histogram(
    "saccade_image_tokens",
    "Tokens of one image in a prompt, by the cap that reduced them.",
    ["cap"],
    buckets=_TOKEN_BUCKETS,
)

# ---------------------------------------------------------------------- image workers

image_workers = Gauge("saccade_image_workers", "Configured image workers.")
image_workers_up = Gauge("saccade_image_workers_up", "Image workers that can take work.")
image_workers_busy = Gauge(
    "saccade_image_workers_busy", "Image workers that are processing an image."
)
image_worker_sandbox = Gauge(
    "saccade_image_worker_sandbox",
    "1 if this layer of the image workers' sandbox is in force.",
    ["layer"],
)
image_queue = Gauge("saccade_image_queue", "Images waiting for a worker.")
image_queue_limit = Gauge("saccade_image_queue_limit", "Limit of images waiting for a worker.")
POOL_GAUGES = (
    image_workers,
    image_workers_up,
    image_workers_busy,
    image_queue,
    image_queue_limit,
)
image_worker_deaths = Counter("saccade_image_worker_deaths_total", "Image workers that died.")
image_worker_restarts = Counter(
    "saccade_image_worker_restarts_total", "Image workers that were started to replace others."
)
images_dropped = Counter(
    "saccade_images_dropped_total", "Images dropped or stopped because all their clients had left."
)

# ---------------------------------------------------------------------- caches and files

image_lookups = Counter(
    "saccade_image_lookups_total",
    "Images looked up in the feature cache before decoding.",
    ["result"],
)
images_joined = Counter(
    "saccade_images_joined_total", "Images that were already being processed for another request."
)
features_evicted = Counter(
    "saccade_features_evicted_total", "Images whose features were evicted from the feature cache."
)
features_to_engines = Counter(
    "saccade_features_to_engines_bytes_total",
    "On Ray Serve, bytes of features in requests to engines: stored in Ray's object store for this "
    "request (stored), or by reference to what was stored before (reused).",
    ["how"],
)
features_bytes = Gauge("saccade_features_bytes", "Bytes of image features that the engine holds.")
fetch_cache_requests = Counter(
    "saccade_fetch_cache_requests_total",
    "Fetched images by cache result: hit (no request), revalidated (confirmed by the image's "
    "server), miss (fetched and cached), bypass (fetched, not cacheable).",
    ["result"],
)
fetch_cache_bytes = Gauge("saccade_fetch_cache_bytes", "Bytes of cached fetched images.")
batches = Gauge("saccade_batches", "Unfinished batches.")
batch_requests = Counter(
    "saccade_batch_requests_total",
    "Requests of batches that have a result, by whether it is an answer.",
    ["outcome"],
)
files = Gauge("saccade_files", "Stored uploaded files.")
file_bytes = Gauge("saccade_file_bytes", "Bytes of uploaded files on the disk.")

for _metric, _values in (
    (requests, OUTCOMES),
    (admission_held, RESOURCES),
    (admission_limit, RESOURCES),
    (refusals, (*sorted(CODES), OTHER_CODE)),
    (cancellations, Stage),
    (request_stage, Stage),
    (time_to_first_token, ("true", "false")),
    (request_seconds, ("true", "false")),
    (image_fetch, SOURCES),
    (image_tokens, CAPS),
    (image_lookups, ("hit", "miss")),
    (features_to_engines, ("stored", "reused")),
    (fetch_cache_requests, ("hit", "revalidated", "miss", "bypass")),
):
    for _value in _values:
        _metric.labels(_value)


@contextmanager
def embedding_cache(snapshots: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Expose the reports of the engines' embedding caches while the context is open."""
    collector = EmbeddingCacheCollector(snapshots)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


_PREFIX = "saccade_embedding_cache_"
_COUNTS = {
    "hits": "Images whose embeddings were in the tier.",
    "misses": "Images whose embeddings were not in the tier.",
    "evictions": "Images whose embeddings were evicted from the tier.",
    "errors": "Failed reads and writes of the tier, and damaged entries.",
    "dropped": "Images that were not written to the tier because its queue was full.",
}


class EmbeddingCacheCollector(Collector):
    """Metrics of the embedding cache by tier, summed over the last reports of the engines.

    A report is {tier: counts}; its `seconds` is {operation: counts by bucket, then their sum}.
    """

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
                # The engines share the tiers below host memory.
                gauge.add_metric([tier], sum(sizes) if tier in ("gpu", "host") else max(sizes))
        yield gauge
        seconds = HistogramMetricFamily(
            _PREFIX + "seconds", "Time to read or write one image's embeddings in a tier.",
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
    """(upper bound, cumulative count) of each bucket, as Prometheus expects."""
    bounds = [*map(str, EMBEDDING_SECONDS), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))

"""Every metric of Saccade's own, on the registry that vLLM's `/metrics` shows."""

from prometheus_client import Counter, Gauge, Histogram

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

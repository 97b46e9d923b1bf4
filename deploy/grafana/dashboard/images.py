"""The path of images into the engine: where the time goes, and whether the workers keep up."""

from .panels import (
    Section,
    heatmap,
    increase,
    mean,
    quantile,
    rate,
    ratio,
    select,
    timeseries,
    total,
)

# Up to the first token, in the order in which a request passes them.
STAGES = (
    "upload", "admission", "fetch", "image_queue", "decode", "preprocess", "render",
    "engine_queue", "encode", "prefill", "first_token",
)  # fmt: skip
STAGE = "saccade_request_stage_seconds"
WORKERS = total("saccade_image_workers")
FIRST_TOKENS = rate("saccade_time_to_first_token_seconds_count")
IMAGES = rate("saccade_image_bytes_count")
FETCH = "saccade_image_fetch_seconds"
BUSY = {
    "decode": rate("saccade_image_decode_seconds_sum"),
    "preprocess": rate("saccade_image_preprocess_seconds_sum"),
}


def _stage(name: str) -> str:
    return f'stage="{name}"'


SECTION = Section(
    "Image path",
    [
        timeseries(
            "Where the time to first token goes: averages",
            "The height is the average time to first token; each stage is its part of it. upload:"
            " the client's network. fetch: the servers of the images. image_queue, decode,"
            " preprocess: image workers. render: the prompt's tokens. engine_queue: the engine is"
            " full. encode: the vision encoder. prefill: the language model. docs/runbook.md,"
            " SaccadeFirstTokenSlow, says what to do about each.",
            "s",
            {s: f"{rate(STAGE + '_sum', _stage(s))} / {FIRST_TOKENS}" for s in STAGES},
            stack=True,
            width=12,
        ),
        timeseries(
            "Where the time to first token goes: p90 by stage",
            "The slowest tenth of each stage. Percentiles do not add up: compare the parts with"
            " each other, not the height with the time to first token.",
            "s",
            {s: quantile(0.9, STAGE, _stage(s)) for s in STAGES},
            stack=True,
            width=12,
        ),
        timeseries(
            "Images",
            "Images received, and lookups in the feature cache.",
            "ops",
            {
                "received": IMAGES,
                "looked up": rate("saccade_image_lookups_total"),
            },
        ),
        timeseries(
            "Pixels per second",
            "Pixels of the images received. Decoding grows with it.",
            "si:px/s",
            {"pixels": rate("saccade_image_pixels_sum")},
        ),
        timeseries(
            "Bytes per second",
            "Encoded bytes of the images received: network and hashing grow with it.",
            "Bps",
            {"bytes": rate("saccade_image_bytes_sum")},
        ),
        timeseries(
            "One image in a worker",
            "Time of one image in each step. A high queue with low decoding: more workers. A high"
            " decoding: large images, or --image-decode exact where fast would do.",
            "s",
            {
                f"{name}, p{round(100 * q)}": quantile(q, f"saccade_image_{metric}_seconds")
                for name, metric in (
                    ("queue", "queue_wait"),
                    ("decode", "decode"),
                    ("preprocess", "preprocess"),
                )
                for q in (0.5, 0.99)
            },
        ),
        timeseries(
            "Work of image workers",
            "Seconds of decoding and preprocessing per second: the workers in use. Near the number"
            " of workers there is no reserve: raise --image-workers if the machine has cores left,"
            " else add a server.",
            "short",
            {**BUSY, "workers": WORKERS},
        ),
        timeseries(
            "Saturation of the pool",
            "Busy workers of those that are configured, at the moment of the scrape, and the same"
            " from the time they worked. Above 80 % for long, images queue.",
            "percentunit",
            {
                "busy now": ratio(total("saccade_image_workers_busy"), WORKERS),
                "busy": ratio(f"({' + '.join(BUSY.values())})", WORKERS),
                "up": ratio(total("saccade_image_workers_up"), WORKERS),
            },
            maximum=1,
        ),
        timeseries(
            "Image queue",
            "Images that wait for a worker, on the fullest server, and the limit at which requests"
            " are refused as image_queue_full.",
            "short",
            {
                "waiting": f"max ({select('saccade_image_queue')})",
                "limit": f"min ({select('saccade_image_queue_limit')})",
            },
        ),
        timeseries(
            "Deaths and restarts of workers",
            "In the interval. A few deaths a day are hostile images, each refused after two"
            " attempts. Many are a lack of memory or a bug in a codec: see docs/runbook.md.",
            "short",
            {
                name: increase(f"saccade_image_worker_{name}_total", over="$__rate_interval")
                for name in ("deaths", "restarts")
            },
        ),
        timeseries(
            "Dropped and joined",
            "Dropped: waiting images whose callers left. Joined: images not decoded twice, because"
            " another request had just sent the same.",
            "ops",
            {
                "dropped": rate("saccade_images_dropped_total"),
                "joined": rate("saccade_images_joined_total"),
            },
        ),
        timeseries(
            "Loading an image, by source",
            "http: a fetch over the network, with redirects and retries. Slow: look at the servers"
            " of the images, and at --fetch-connections-per-host.",
            "s",
            {
                "{{source}}, p50": quantile(0.5, FETCH, by="source"),
                "{{source}}, p99": quantile(0.99, FETCH, by="source"),
            },
        ),
        timeseries(
            "Images by source",
            "How images arrive: in the request (data), from the web, from the disk, or uploaded"
            " before.",
            "ops",
            {"{{source}}": rate(f"{FETCH}_count", by="source")},
            stack=True,
        ),
        timeseries(
            "Failed fetches",
            "Requests refused because an image could not be fetched, was late, or is behind an"
            " address that this server does not fetch from.",
            "reqps",
            {
                code: rate("saccade_refusals_total", f'code="{code}"')
                for code in ("image_fetch_failed", "image_fetch_timeout", "image_url_blocked")
            },
            stack=True,
        ),
        timeseries(
            "Average size of an image",
            "Encoded bytes and pixels. Pictures much larger than the model uses waste upload and"
            " decoding: ask the clients to shrink them.",
            "short",
            {"bytes": mean("saccade_image_bytes"), "pixels": mean("saccade_image_pixels")},
        ),
        heatmap("Pixels of images", "How the sizes of images are spread.", "si:px",
                "saccade_image_pixels"),
        heatmap("Bytes of images", "How the encoded sizes are spread.", "bytes",
                "saccade_image_bytes"),
    ],
)  # fmt: skip

"""What clients see: the number of requests, their latency, their outcomes."""

from .panels import (
    SERVERS,
    Section,
    heatmap,
    percentiles,
    quantile,
    rate,
    ratio,
    select,
    stat,
    table,
    timeseries,
    total,
)

TTFT = "saccade_time_to_first_token_seconds"
REQUESTS = rate("saccade_requests_total")
GOOD = rate(f"{TTFT}_bucket", 'le="$ttft"')
FIRST_TOKENS = rate(f"{TTFT}_count")


def _share(outcome: str) -> str:
    return ratio(rate("saccade_requests_total", f'outcome="{outcome}"'), REQUESTS)


SECTION = Section(
    "Overview",
    [
        stat(
            "Ready servers",
            "Servers that take requests. Fewer than you run: look at the table of servers below and"
            " at /ready of the missing ones.",
            "short",
            total("saccade_ready"),
            steps=[(None, "red"), (1, "green")],
        ),
        stat("Requests", "Requests that ended, per second.", "reqps", REQUESTS),
        stat(
            "Goodput",
            "Share of the answered requests whose first token came within the goal chosen above."
            " Low: see where the time goes in the row Image path.",
            "percentunit",
            ratio(GOOD, FIRST_TOKENS),
            steps=[(None, "red"), (0.9, "orange"), (0.95, "green")],
        ),
        stat(
            "Time to first token, p99",
            "One request in a hundred waits longer than this for its first token.",
            "s",
            quantile(0.99, TTFT),
        ),
        stat(
            "Failed",
            "Share of the requests that ended with a status of 500 and above, except 503. It should"
            " be 0: read the server's log.",
            "percentunit",
            _share("failed"),
            steps=[(None, "green"), (0.001, "orange"), (0.01, "red")],
        ),
        stat("In flight", "Requests in progress.", "short", total("saccade_requests_in_flight")),
        timeseries(
            "Requests by outcome",
            "Refused: the request's own fault (4xx), or a server that is full (503); the codes are"
            " beside. Failed: other server errors. Cancelled: the client left.",
            "reqps",
            {"{{outcome}}": rate("saccade_requests_total", by="outcome")},
            stack=True,
        ),
        timeseries(
            "Goodput",
            "First tokens per second, and those within the goal chosen above. The distance"
            " between the lines is the requests that waited too long; where it opens, the load is"
            " too high.",
            "reqps",
            {"all": FIRST_TOKENS, "within the goal": GOOD},
        ),
        timeseries(
            "Refusals by code",
            "docs/errors.md explains each code. server_busy calls for more image workers or"
            " servers, image_fetch_* for a look at the servers of the images.",
            "reqps",
            {"{{code}}": rate("saccade_refusals_total", by="code") + " > 0"},
            stack=True,
        ),
        timeseries(
            "Time to first token with images",
            "From the first byte of a request to the first token of its answer. Higher than without"
            " images by more than some 100 ms: see the row Image path.",
            "s",
            percentiles(TTFT, 'images="true"'),
        ),
        timeseries(
            "Time to first token without images",
            "The engine's share of the time to first token. If this is high too, the engine has too"
            " much to do: see the row Engine.",
            "s",
            percentiles(TTFT, 'images="false"'),
        ),
        timeseries(
            "Time between tokens",
            "Inter-token latency in the engine. It grows with the requests in a batch, and when"
            " prefills of large prompts interrupt: fewer image tokens help, or --max-num-seqs.",
            "s",
            percentiles("vllm:inter_token_latency_seconds"),
        ),
        timeseries(
            "Request time",
            "From the first byte of a request to the last one of its answer.",
            "s",
            percentiles("saccade_request_seconds", 'images="true"', "images")
            | percentiles("saccade_request_seconds", 'images="false"', "text"),
        ),
        timeseries(
            "Requests that failed, were refused or cancelled",
            "As shares of all. Failed ones are bugs or broken machines; refused ones clients to"
            " talk to; many cancelled ones mean that clients wait longer than they want to.",
            "percentunit",
            {outcome: _share(outcome) for outcome in ("failed", "refused", "cancelled")},
        ),
        timeseries(
            "In flight",
            "Requests in the server, and of these, in the engine. The others are"
            " being read, or waiting for their images.",
            "short",
            {
                "server": total("saccade_requests_in_flight"),
                "engine, running": total("vllm:num_requests_running"),
                "engine, waiting": total("vllm:num_requests_waiting"),
            },
        ),
        heatmap(
            "Time to first token",
            "How the times are spread. Two bands are two kinds of requests, such as with images and"
            " without, or cached and new ones.",
            "s",
            TTFT,
        ),
        timeseries(
            "Cancellations by stage",
            "The stage of a request when its client left. Before the first token:"
            " the client's timeout is shorter than the wait.",
            "reqps",
            {"{{stage}}": rate("saccade_cancellations_total", by="stage")},
            stack=True,
        ),
        table(
            "Servers",
            "One line per server. A short uptime is a restart: the log before it has the cause.",
            {
                "build": f"max by (instance, model, version, vllm, device)"
                f" ({select('saccade_build_info')})",
                "ready": f"max by (instance) ({select('saccade_ready')})",
                "up": f"max by (instance) (time() - process_start_time_seconds{{{SERVERS}}})",
                "in flight": f"max by (instance) ({select('saccade_requests_in_flight')})",
            },
            renamed={
                "instance": "server",
                "Value #A": "build",
                "Value #B": "ready",
                "Value #C": "uptime (s)",
                "Value #D": "in flight",
            },
            width=8,
        ),
    ],
)

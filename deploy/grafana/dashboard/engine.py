"""vLLM's own metrics, and the process around it."""

from .panels import SERVERS, Section, heatmap, mean, percentiles, rate, select, timeseries, total

SECTION = Section(
    "Engine",
    [
        timeseries(
            "Requests in the engine",
            "capacity: waiting for space in the batch or the KV cache. deferred: waiting for"
            " something else, such as embeddings that are being read.",
            "short",
            {
                "running": total("vllm:num_requests_running"),
                "waiting, {{reason}}": total("vllm:num_requests_waiting_by_reason", by="reason"),
            },
            stack=True,
        ),
        timeseries(
            "Use of the KV cache, by engine",
            "Engines of one server should be alike.",
            "percentunit",
            {"{{instance}} {{engine}}": f"{select('vllm:kv_cache_usage_perc')}"},
            maximum=1,
        ),
        timeseries(
            "Preemptions",
            "Requests whose KV cache was evicted for others and must be computed again. They"
            " should be rare: lower --max-num-seqs, or give the KV cache more memory.",
            "ops",
            {"preemptions": rate("vllm:num_preemptions_total")},
        ),
        timeseries(
            "Time in the engine's queue",
            "A full batch or KV cache makes requests wait here.",
            "s",
            percentiles("vllm:request_queue_time_seconds"),
        ),
        timeseries(
            "Time of prefills",
            "From being scheduled to the first token: the vision encoder and the prompt.",
            "s",
            percentiles("vllm:request_prefill_time_seconds"),
        ),
        timeseries(
            "Time of decoding",
            "From the first token to the last. It grows with the length of answers.",
            "s",
            percentiles("vllm:request_decode_time_seconds"),
        ),
        heatmap(
            "Tokens of a step",
            "Large steps are prefills, small ones decoding. All near --max-num-batched-tokens: the"
            " engine is full of prefills.",
            "short",
            "vllm:iteration_tokens_total",
        ),
        timeseries(
            "Tokens of a request",
            "Averages of prompt and answer.",
            "short",
            {
                "prompt": mean("vllm:request_prompt_tokens"),
                "answer": mean("vllm:request_generation_tokens"),
            },
        ),
        timeseries(
            "Answers by finish reason",
            "length: max_tokens ended the answer. abort: the client left. error: see the log.",
            "reqps",
            {"{{finished_reason}}": rate("vllm:request_success_total", by="finished_reason")},
            stack=True,
        ),
        timeseries(
            "Time to first token in the engine",
            "As vLLM counts it: from when the request, with its images, reached the engine.",
            "s",
            percentiles("vllm:time_to_first_token_seconds"),
        ),
        timeseries(
            "CPU of the server process",
            "Without the engine and the image workers. Near 1 core: the event loop is the limit,"
            " and another server is needed.",
            "short",
            {"{{instance}}": f"rate(process_cpu_seconds_total{{{SERVERS}}}[$__rate_interval])"},
        ),
        timeseries(
            "Memory of the server process",
            "Resident, without the engine and the image workers. Growth without end is a leak.",
            "bytes",
            {"{{instance}}": f"process_resident_memory_bytes{{{SERVERS}}}"},
        ),
    ],
    closed=True,
)

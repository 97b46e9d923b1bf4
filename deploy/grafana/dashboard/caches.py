"""The caches: hit ratios, sizes, evictions."""

from .panels import Section, increase, quantile, rate, timeseries, total

LOOKUPS = "saccade_image_lookups_total"
FETCHES = "saccade_fetch_cache_requests_total"
HITS, MISSES = "saccade_embedding_cache_hits_total", "saccade_embedding_cache_misses_total"
SECONDS = "saccade_embedding_cache_seconds"


def _ratio(cache: str) -> str:
    return f"{rate(f'vllm:{cache}_hits_total')} / {rate(f'vllm:{cache}_queries_total')}"


SECTION = Section(
    "Caches",
    [
        timeseries(
            "Hit ratios",
            "features: images that need no decoding. fetches: images that need no full download."
            " prefixes: prompt tokens whose KV cache is held. A gap means no lookups."
            " Low although images repeat: the cache is too small, or its entries differ in caps or"
            " in the groups of their keys (docs/caching.md).",
            "percentunit",
            {
                "features": f"""{rate(LOOKUPS, 'result="hit"')} / {rate(LOOKUPS)}""",
                "fetches": f"""{rate(FETCHES, 'result=~"hit|revalidated"')} / {rate(FETCHES)}""",
                "prefixes": _ratio("prefix_cache"),
                "vLLM's features": _ratio("mm_cache"),
            },
            maximum=1,
        ),
        timeseries(
            "Hit ratio of embeddings, by tier",
            "Share of the images looked up in the tier. An image is encoded when all tiers"
            " miss it.",
            "percentunit",
            {"{{tier}}": f"{rate(HITS, by='tier')} /"
                         f" ({rate(HITS, by='tier')} + {rate(MISSES, by='tier')})"},
            maximum=1,
        ),
        timeseries(
            "Embeddings found, by tier",
            "Images per second whose embeddings were found, by tier.",
            "ops",
            {"{{tier}}": rate(HITS, by="tier")},
            stack=True,
        ),
        timeseries(
            "Feature lookups",
            "A hit is an image that is neither decoded nor preprocessed. More hits:"
            " --mm-processor-cache-gb.",
            "ops",
            {"{{result}}": rate(LOOKUPS, by="result")},
            stack=True,
        ),
        timeseries(
            "Fetches and their cache",
            "hit: no request. revalidated: a request without a download. miss: downloaded and kept."
            " bypass: the image's server does not let caches keep it.",
            "ops",
            {"{{result}}": rate(FETCHES, by="result")},
            stack=True,
        ),
        timeseries(
            "Prompt tokens by source",
            "local_compute is work, the others are found in a cache. Images first in the prompt are"
            " found more often.",
            "short",
            {"{{source}}": rate("vllm:prompt_tokens_by_source_total", by="source")},
            stack=True,
        ),
        timeseries(
            "Bytes held",
            "By cache, over all servers. For the shared store, see its own metrics.",
            "bytes",
            {
                "embeddings, {{tier}}": total("saccade_embedding_cache_bytes", by="tier"),
                "features": total("saccade_features_bytes"),
                "fetches": total("saccade_fetch_cache_bytes"),
                "files": total("saccade_file_bytes"),
            },
        ),
        timeseries(
            "Evictions",
            "Evicted entries. Many, with a low hit ratio: the cache is too small.",
            "ops",
            {
                "features": rate("saccade_features_evicted_total"),
                "embeddings, {{tier}}": rate("saccade_embedding_cache_evictions_total", by="tier"),
            },
        ),
        timeseries(
            "Errors and drops of embeddings, by tier",
            "Errors: reads and writes that failed, such as a store that is down; images are encoded"
            " instead. Dropped: written too slowly to be kept.",
            "ops",
            {
                "errors, {{tier}}": rate("saccade_embedding_cache_errors_total", by="tier"),
                "dropped, {{tier}}": rate("saccade_embedding_cache_dropped_total", by="tier"),
            },
        ),
        timeseries(
            "Time to read or write an entry of embeddings",
            "Reading and writing one image's embeddings. A read above --embedding-cache-wait-s is"
            " not waited for, and the tier is of no use.",
            "s",
            {
                "{{tier}} {{operation}}, p50": quantile(0.5, SECONDS, by="tier, operation"),
                "{{tier}} {{operation}}, p99": quantile(0.99, SECONDS, by="tier, operation"),
            },
        ),
        timeseries(
            "Encodings saved",
            "Images over the range of the dashboard whose embeddings were found, by tier.",
            "short",
            {"{{tier}}": increase(HITS, by="tier")},
        ),
        timeseries("Uploaded files", "Files in the store.", "short",
                   {"files": total("saccade_files")}),
        timeseries("Batches", "Unfinished batches; results of their requests per second.", "short",
                   {"unfinished": total("saccade_batches"),
                    "{{outcome}}/s": rate("saccade_batch_requests_total", by="outcome")}),
    ],
    closed=True,
)  # fmt: skip

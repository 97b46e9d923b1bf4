"""What images cost: tokens, and money."""

from .panels import (
    Section,
    increase,
    mean,
    percentiles,
    quantile,
    rate,
    ratio,
    select,
    stat,
    timeseries,
    total,
)

IMAGE_TOKENS = "saccade_image_tokens"
IMAGES = rate(f"{IMAGE_TOKENS}_count")
PROMPT = "vllm:prompt_tokens_total"
# Over the dashboard's range, for all selected servers. Devices are counted twice a minute, so
# servers that started or stopped within the range count only while they ran.
DEVICE_SECONDS = f"sum_over_time(({total('saccade_devices')})[$__range:30s]) * 30"
SPENT = f"$price * {DEVICE_SECONDS} / 3600"
IMAGES_SEEN = increase(f"{IMAGE_TOKENS}_count")
TOKENS_SEEN = increase(f"{IMAGE_TOKENS}_sum")
PROMPT_SEEN = increase(PROMPT)
ALL_TOKENS_SEEN = f"({PROMPT_SEEN} + {increase('vllm:generation_tokens_total')})"
CAPPED_IMAGES = increase(f"{IMAGE_TOKENS}_count", 'cap!="none"')

SECTION = Section(
    "Tokens and cost",
    [
        stat(
            "Tokens of 1000 images",
            "Image tokens per 1000 images in prompts, over the range of the dashboard.",
            "short",
            ratio(f"1000 * {TOKENS_SEEN}", IMAGES_SEEN),
            instant=True,
        ),
        stat(
            "Cost of 1000 images",
            "Accelerators x price x time, over the images of the range. Idle time counts too."
            " Set the price above.",
            "currencyUSD",
            ratio(f"1000 * {SPENT}", IMAGES_SEEN),
            decimals=3,
            instant=True,
        ),
        stat(
            "Cost of 1M tokens",
            "The same over all tokens, of prompts and answers.",
            "currencyUSD",
            ratio(f"1e6 * {SPENT}", ALL_TOKENS_SEEN),
            decimals=3,
            instant=True,
        ),
        stat(
            "GPU seconds of an image",
            "Seconds of accelerators held per image of a prompt, over the range.",
            "s",
            ratio(DEVICE_SECONDS, IMAGES_SEEN),
            instant=True,
        ),
        stat(
            "Image tokens in prompts",
            "Share of the prompt tokens that are images. The higher, the more a cap saves.",
            "percentunit",
            ratio(TOKENS_SEEN, PROMPT_SEEN),
            instant=True,
        ),
        stat(
            "Capped images",
            "Share of the images that a cap made smaller: --max-image-tokens, or one of a request.",
            "percentunit",
            ratio(CAPPED_IMAGES, IMAGES_SEEN),
            instant=True,
        ),
        timeseries(
            "Tokens of an image",
            "What an image costs. Too much: --max-image-tokens caps all, detail and"
            " max_image_tokens those of a request.",
            "short",
            {"average": mean(IMAGE_TOKENS), **percentiles(IMAGE_TOKENS)},
        ),
        timeseries(
            "Image tokens by cap",
            "Tokens of images per second, by the cap that made them smaller: none, the server's,"
            " the budget of the request, or the image's own.",
            "short",
            {"{{cap}}": rate(f"{IMAGE_TOKENS}_sum", by="cap")},
            stack=True,
        ),
        timeseries(
            "Tokens per image, p90 by cap",
            "Tokens that remain under the caps.",
            "short",
            {"{{cap}}": quantile(0.9, IMAGE_TOKENS, by="cap")},
        ),
        timeseries(
            "Image tokens in prompts",
            "Share of the prompt tokens that are images.",
            "percentunit",
            {"image tokens": f"{rate(IMAGE_TOKENS + '_sum')} / {rate(PROMPT)}"},
            maximum=1,
        ),
        timeseries(
            "Tokens per second",
            "Throughput of the engine. Cached prompt tokens are counted in prompts, and cost"
            " nothing.",
            "short",
            {
                "prompts": rate(PROMPT),
                "prompts, cached": rate("vllm:prompt_tokens_cached_total"),
                "images": rate(f"{IMAGE_TOKENS}_sum"),
                "answers": rate("vllm:generation_tokens_total"),
            },
        ),
        timeseries(
            "Use of the KV cache",
            "The fullest engine. At 100 % requests wait or are preempted: lower --max-model-len or"
            " image tokens, or add memory or servers.",
            "percentunit",
            {"max": f"max ({select('vllm:kv_cache_usage_perc')})",
             "average": f"avg ({select('vllm:kv_cache_usage_perc')})"},
            maximum=1,
        ),
        timeseries(
            "Cost of 1000 images",
            "At the current load: the price of the accelerators over the images per second."
            " It falls with load, until the time to first token rises.",
            "currencyUSD",
            {"cost": ratio(f"1000 * $price * {total('saccade_devices')} / 3600", IMAGES)},
        ),
    ],
)  # fmt: skip

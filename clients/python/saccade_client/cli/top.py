"""`saccade top`: what the server does right now, from its metrics."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from saccade_client import DEFAULT_URL
from saccade_client.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from saccade_client.client import Client

_TIMEOUT_S = 10.0
Sample = dict[str, float]


def top(
    url: options.Url = DEFAULT_URL,
    api_key: options.Key = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, over one interval.")] = False,
    json: options.Json = False,
) -> None:
    """Show what the server does: requests, times, tokens, workers, caches. Ctrl-C ends it."""
    with options.connected(url, api_key, timeout_s=_TIMEOUT_S, retries=0) as client:
        if not json and not once and _is_screen():
            _live(client, interval, url)
            return
        for row in _rates(client, interval):
            if json:
                options.print_json(row)
            else:
                print("\n".join(f"{name}\t{_shown(name, value)}" for name, value in row.items()))
            if once:
                return


def _is_screen() -> bool:
    """Whether the output is a terminal that can be drawn on."""
    from rich.console import Console

    return sys.stdout.isatty() and not Console().is_dumb_terminal


def _live(client: "Client", interval: float, url: str) -> None:
    """Show a screen until Ctrl-C. A server that stops meanwhile is waited for."""
    from rich.live import Live
    from rich.text import Text

    from saccade_client.errors import ConnectionFailed, ServerError, TimedOut

    _read(client)  # a server that does not answer at the start is an error
    shown: Text | Table = Text(f"{url}: looking...")
    with suppress(KeyboardInterrupt), Live(shown, screen=True, auto_refresh=False) as live:
        while True:
            try:
                for row in _rates(client, interval):
                    live.update(_table(row, url, live.console.width), refresh=True)
            except (ConnectionFailed, ServerError, TimedOut) as error:
                live.update(Text(f"{url}: {error}; trying again..."), refresh=True)
                time.sleep(interval)


def _table(row: Sample, url: str, width: int) -> "Table":
    from rich.table import Table

    table: Table = Table(title=url, title_justify="left", box=None, show_header=False)
    shown = {name.replace("_", " "): _shown(name, value) for name, value in row.items()}
    # In a narrow terminal, names are cut, not figures. Each column has a margin of two.
    table.add_column(no_wrap=True, max_width=max(1, width - 4 - max(map(len, shown.values()))))
    table.add_column(justify="right", no_wrap=True)
    for name, text in shown.items():
        table.add_row(name, text)
    return table


def _shown(name: str, value: float) -> str:
    if name.endswith("_ms"):
        return f"{value:.0f}"
    if name.endswith("_share"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _rates(client: "Client", interval: float) -> Iterator[Sample]:
    """What has happened in each interval; without end."""
    before, at = _read(client), time.monotonic()
    while True:
        time.sleep(interval)
        now, later = _read(client), time.monotonic()
        yield _row(before, now, later - at)
        before, at = now, later


def _read(client: "Client") -> Sample:
    """The sums of all metrics by their names; of some, also by `name:label`."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Sample = defaultdict(float)
    for family in text_string_to_metric_families(client.metrics()):
        for sample in family.samples:
            found[sample.name] += sample.value
            for label in ("outcome", "result", "code", "tier"):
                if label in sample.labels:
                    found[f"{sample.name}:{sample.labels[label]}"] += sample.value
    return found


def _row(before: Sample, now: Sample, seconds: float) -> Sample:
    """The figures to show. Those of Saccade are missing if the server is another one."""

    def rate(name: str) -> float:
        return max(0.0, now[name] - before[name]) / seconds

    def mean_ms(name: str) -> float:
        count = now[f"{name}_count"] - before[f"{name}_count"]
        return 1000 * (now[f"{name}_sum"] - before[f"{name}_sum"]) / count if count > 0 else 0.0

    row = {
        "requests_per_s": rate("vllm:request_success_total"),
        "running": now["vllm:num_requests_running"],
        "waiting_for_the_engine": now["vllm:num_requests_waiting"],
        "time_to_first_token_ms": mean_ms("vllm:time_to_first_token_seconds"),
        "prompt_tokens_per_s": rate("vllm:prompt_tokens_total"),
        "answer_tokens_per_s": rate("vllm:generation_tokens_total"),
        "kv_cache_share": now["vllm:kv_cache_usage_perc"],
    }
    if "saccade_ready" not in now:
        return row
    hits = rate("saccade_image_lookups_total:hit")
    lookups = rate("saccade_image_lookups_total")
    row |= {
        "waiting_for_a_permit": now["saccade_requests_waiting"],
        "refused_per_s": rate("saccade_refusals_total"),
        "images_per_s": lookups,
        "images_cached_share": hits / lookups if lookups else 0.0,
        "decode_ms": mean_ms("saccade_image_decode_seconds"),
        "preprocess_ms": mean_ms("saccade_image_preprocess_seconds"),
        "image_workers": now["saccade_image_workers_up"],
        "image_workers_busy": now["saccade_image_workers_busy"],
        "images_waiting": now["saccade_image_queue"],
    }
    for tier in ("gpu", "host", "disk", "shared"):
        name = "saccade_embedding_cache_{}_total:" + tier
        if name.format("hits") in now:
            row[f"embeddings_from_{tier}_per_s"] = rate(name.format("hits"))
    return row

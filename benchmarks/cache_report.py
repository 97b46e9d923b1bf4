"""The results of the cache benchmark: a row for each round, a table of medians, a file."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cache_servers import Counters
from benchmarks.chats import Chats
from benchmarks.load import Answer, Result
from benchmarks.measure import percentile
from benchmarks.processes import ServerFailed


@dataclass(frozen=True, slots=True)
class Row:
    """One server, driven with one round of chats or a part of it; times in seconds."""

    section: str  # the working set or the phase
    server: str
    requests: int
    pictures: int
    failures: int
    first_error: str
    encoder_runs: int
    encoder_runs_per_picture: float
    requests_per_second: float
    ttft_p50: float
    ttft_p95: float
    later_ttft_p50: float | None  # without the first turn of each chat
    later_ttft_p95: float | None
    hits: dict[str, int]  # by tier

    @classmethod
    def of(
        cls, section: str, server: str, chats: Chats, result: Result, counted: Counters
    ) -> "Row":
        """Make the row of a drive of all requests of `chats`."""
        errors = [answer.error for answer in result.answers if answer.error]
        times = _first_tokens(result.answers)
        later = _first_tokens(result.answers[chats.pictures :])
        if not times:
            raise ServerFailed(f"{server} answered no request: {errors[0]}")
        return cls(
            section=section,
            server=server,
            requests=len(result.answers),
            pictures=chats.pictures,
            failures=len(errors),
            first_error=errors[0] if errors else "",
            encoder_runs=counted.encoder_runs,
            encoder_runs_per_picture=counted.encoder_runs / chats.pictures,
            requests_per_second=(len(result.answers) - len(errors)) / result.wall,
            ttft_p50=percentile(times, 0.50),
            ttft_p95=percentile(times, 0.95),
            later_ttft_p50=percentile(later, 0.50) if later else None,
            later_ttft_p95=percentile(later, 0.95) if later else None,
            hits=counted.hits,
        )


def table(rows: Sequence[Row]) -> str:
    """Return the rows of one section as text: medians over the rounds, and failures in all."""
    titles = ("runs", "per picture", "requests/s", "TTFT p50", "p95", "later p50", "p95", "failed")
    widths = [max(len(title), 8) for title in titles]
    head = "".join(f"  {title:>{width}}" for title, width in zip(titles, widths, strict=True))
    lines = [f"{rows[0].section}", f"  {'times in ms':18}{head}  hits"]
    for name in dict.fromkeys(row.server for row in rows):
        own = [row for row in rows if row.server == name]
        cells = [
            f"{_median(own, 'encoder_runs'):.0f}",
            f"{_median(own, 'encoder_runs_per_picture'):.2f}",
            f"{_median(own, 'requests_per_second'):.2f}",
            *(
                "-" if getattr(own[0], field) is None else f"{_median(own, field) * 1e3:.0f}"
                for field in ("ttft_p50", "ttft_p95", "later_ttft_p50", "later_ttft_p95")
            ),
            f"{sum(row.failures for row in own)}",
        ]
        shown = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        hits = ", ".join(f"{tier} {count}" for tier, count in own[-1].hits.items() if count)
        lines.append(f"  {name:18}{shown}  {hits}")
    return "\n".join(lines)


def save(path: Path, content: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write all measurements, including each round."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = content | {"rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")


def _first_tokens(answers: Sequence[Answer]) -> list[float]:
    return [each.first_token for each in answers if each.first_token is not None and not each.error]


def _median(rows: Sequence[Row], field: str) -> float:
    values: list[float] = [getattr(row, field) for row in rows]
    return statistics.median(values)

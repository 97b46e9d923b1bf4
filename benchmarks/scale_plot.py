"""The plot of the comparison of routing policies."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_SHOWN = (
    ("hit_rate", "hit rate", False),
    ("busiest_over_mean", "work of the busiest / mean", True),
    ("p99_s", "p99, s", True),
)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the hit rates, the load of the hottest replica and the slowest answers as a PNG file."""
    rows = result["compared"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    for line, trace in zip(grid, ("zipf", "sessions"), strict=True):
        for axes, (name, title, is_log) in zip(line, _SHOWN, strict=True):
            for policy in dict.fromkeys(row["policy"] for row in rows):
                points = [
                    (row["replicas"], row[name])
                    for row in rows
                    if row["policy"] == policy and row["trace"] == trace
                ]
                axes.plot(*zip(*points, strict=True), label=policy, marker="o", ms=3, lw=1)
            axes.set_xscale("log")
            axes.set_yscale("log" if is_log else "linear")
            axes.set_title(f"{trace}: {title}", fontsize="medium")
            axes.grid(alpha=0.3)
        line[0].set_ylim(0, 1)
    for axes in grid[-1]:
        axes.set_xlabel("replicas")
    grid[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)

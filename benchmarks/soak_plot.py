"""The plot of a soak: memory, threads and open files over time, with the faults."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_SHOWN = ("server", "forkserver", "image workers", "engine core", "engine worker")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the samples of a result and write a PNG file."""
    samples = result["samples"]
    minutes = [each["at_s"] / 60 for each in samples]
    figure = Figure(figsize=(10, 9), layout="constrained")
    memory, threads, files = figure.subplots(3, 1, sharex=True)
    for role in _SHOWN:
        uses = [each["roles"].get(role, {}) for each in samples]
        for axes, name in ((memory, "anonymous_mib"), (threads, "threads"), (files, "files")):
            axes.plot(minutes, [use.get(name, float("nan")) for use in uses], label=role, lw=1)
    for axes, title in (
        (memory, "anonymous memory, MiB"),
        (threads, "threads"),
        (files, "open files"),
    ):
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        for fault in result["faults"]:
            axes.axvline(fault["at_s"] / 60, color="grey", lw=0.4)
        for phase in ("before", "after"):
            axes.axvline(result[phase]["at_s"] / 60, color="black", lw=1, ls="--")
    memory.legend(ncols=len(_SHOWN), fontsize="small", loc="upper center")
    memory.set_title(
        "Grey lines: faults. Dashed lines: idle and settled, before and after the soak."
    )
    files.set_xlabel("minutes")
    figure.savefig(path, dpi=110)

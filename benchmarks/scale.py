"""Routing policies with 2 to 1,000 replicas, in a simulation that uses the server's own decision.

    python -m benchmarks.scale [--quick] [--output FILE]

Writes benchmarks/results/<date>-scale.json and draws docs/pictures/scale.png. `fleet_model` says
what is modelled. Hit rates and times are of the second half of each trace, with full caches.
"""

import argparse
import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import environment, scale_plot
from benchmarks.fleet_model import (
    CACHED,
    HIT_S,
    LOAD,
    MISS_S,
    PICTURES,
    POLICIES,
    Event,
    Fleet,
    Request,
    mean_work_s,
    run,
    session_trace,
    summary,
    zipf_trace,
)
from server.scale.routing import Replicas

_ROOT = Path(__file__).resolve().parent.parent
_SIZES = (2, 4, 10, 30, 100, 300, 1000)
_EACH = 300  # requests for each replica
_SLOW = 0.5
_KEYS = 20_000
_TRACES = {"zipf": zipf_trace, "sessions": session_trace}


def rate(replicas: int) -> float:
    """Requests a second that keep all replicas busy for `LOAD` of the time, at the hit rate of a
    good router."""
    return LOAD * replicas / mean_work_s()


def compared(sizes: Iterable[int], each: int) -> list[dict[str, Any]]:
    """Every policy with every number of replicas and every trace."""
    found = []
    for replicas in sizes:
        for kind, make in _TRACES.items():
            trace = make(replicas, each, rate(replicas))
            for policy in POLICIES:
                found.append(
                    {"replicas": replicas, "trace": kind, "policy": policy}
                    | measured([1.0] * replicas, policy, trace)
                )
                print(found[-1], flush=True)
    return found


def measured(
    speeds: list[float], policy: str, trace: list[Request], events: tuple[Event, ...] = ()
) -> dict[str, Any]:
    done = run(Fleet(speeds, POLICIES[policy]), trace, events)
    return summary(done, len(speeds), since_s=trace[len(trace) // 2][0])


def mixed_speeds(replicas: int, each: int) -> list[dict[str, Any]]:
    """Every other replica is half as fast, and so much less is asked of all."""
    speeds = [1.0, _SLOW] * (replicas // 2)
    trace = zipf_trace(replicas, each, rate(replicas) * sum(speeds) / replicas)
    return [
        {"replicas": replicas, "policy": policy} | measured(speeds, policy, trace)
        for policy in POLICIES
    ]


def killed(replicas: int, each: int) -> list[dict[str, Any]]:
    """A replica is killed halfway, and is back without its pictures for the last quarter."""
    trace = zipf_trace(replicas, each, rate(replicas))
    (at_s, back_s) = (trace[len(trace) * part // 4][0] for part in (2, 3))
    found = []
    for policy in POLICIES:
        lost: list[Request] = []

        def kill(fleet: Fleet, lost: list[Request] = lost) -> list[Request]:
            lost += fleet.kill("replica-0")
            return lost

        def back(fleet: Fleet) -> list[Request]:
            fleet.add("replica-0", now_s=back_s)
            return []

        done = run(Fleet([1.0] * replicas, POLICIES[policy]), trace, ((at_s, kill), (back_s, back)))
        assert len(done) == len(trace), "a request got no answer"
        phases = {
            "before": [each for each in done if trace[len(trace) // 4][0] <= each.came_s < at_s],
            "while it is away": [each for each in done if at_s <= each.came_s < back_s],
            "after": [each for each in done if back_s <= each.came_s],
        }
        found.append(
            {
                "replicas": replicas,
                "policy": policy,
                "sent_again": len(lost),
                "phases": {name: summary(part, replicas) for name, part in phases.items()},
            }
        )
    return found


def moved(sizes: Iterable[int]) -> list[dict[str, Any]]:
    """The share of keys whose first replica is another one when one is added. Taking it away again
    gives all of them back."""
    keys = [f"picture {n}" for n in range(_KEYS)]

    def owners(count: int) -> list[int]:
        replicas = Replicas([f"replica-{n}" for n in range(count)])
        return [replicas.ranked(key, 1)[0] for key in keys]

    found = []
    for count in sizes:
        before, after = owners(count), owners(count + 1)
        share = sum(a != b for a, b in zip(before, after, strict=True)) / _KEYS
        found.append(
            {"from": count, "to": count + 1, "moved": share, "least": round(1 / (count + 1), 5)}
        )
    return found


def hot_picture(replicas: int, each: int) -> list[dict[str, Any]]:
    """Half of all requests are about one picture."""
    trace = zipf_trace(replicas, each, rate(replicas))
    trace = [(at_s, "hot" if n % 2 else picture) for n, (at_s, picture) in enumerate(trace)]
    return [
        {"replicas": replicas, "policy": policy} | measured([1.0] * replicas, policy, trace)
        for policy in POLICIES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 10 replicas, short traces")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes, each, many = (_SIZES, _EACH, 100) if not options.quick else (_SIZES[:3], 100, 10)
    result = {
        "environment": environment.describe(),
        "stubbed": "all but the routing decision and the eviction: benchmarks/fleet_model.py",
        "options": {
            "requests_each": each,
            "pictures_each": PICTURES,
            "cached_each": CACHED,
            "hit_s": HIT_S,
            "miss_s": MISS_S,
            "load": LOAD,
        },
        "compared": compared(sizes, each),
        "mixed_speeds": mixed_speeds(many, each),
        "killed": [row for count in (2, many) for row in killed(count, each)],
        "hot_picture": [row for count in (2, many) for row in hot_picture(count, each)],
        "moved": moved((1, 2, *(size for size in sizes if size > 2))),
    }
    today = datetime.datetime.now(tz=datetime.UTC).date()
    output = options.output or _ROOT / f"benchmarks/results/{today}-scale.json"
    output.write_text(json.dumps(result, indent=2) + "\n")
    if not options.quick:
        scale_plot.plot(result, _ROOT / "docs" / "pictures" / "scale.png")
    print(output)


if __name__ == "__main__":
    main()

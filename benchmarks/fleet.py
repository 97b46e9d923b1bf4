"""Two servers with the demo model behind haproxy: what affinity gives, and what a death costs.

    python -m benchmarks.fleet [--requests N] [--clients N] [--output FILE]

Clients ask about pictures whose popularity follows Zipf's law, one request after the other, more
pictures than the caches hold: with the configuration in `deploy/haproxy`, and with round robin in
its place. Then all ask about one picture, and one server is killed under load and started again.
The model of `benchmarks.scale` gets the same requests, so that the two can be compared. Times say
nothing here, since servers and clients share the machine; nothing is stubbed.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, fleet_load, fleet_model
from benchmarks.fleet_load import Load
from benchmarks.fleet_servers import cleared, entries, haproxy, server, stopped
from benchmarks.processes import Server, free_port
from server.scale.routing import Rule
from tests.services import program

_ROOT = Path(__file__).resolve().parent.parent
_PICTURES, _ALPHA = 400, 0.6
# As many clients as fill the batches of both servers.
_CLIENTS, _REQUESTS = 32, 3000
_HOT, _KILLED, _KEYS = 600, 800, 60
_SALTS = 10


def _modelled(
    order: Sequence[int], since: int, policy: fleet_model.Choose, room: int, clients: int
) -> dict[str, float]:
    """The same requests in the model: each client sends the next when its last is answered. Which
    pictures fall to which replica differs from haproxy's ring, so this is the mean of several."""
    found = []
    for salt in range(_SALTS):
        fleet = fleet_model.Fleet([1.0, 1.0], policy, entries=room)
        pictures = [f"{salt} picture {n}" for n in order]
        done = fleet_model.run_closed(fleet, pictures, clients)
        counted = sorted(done, key=lambda each: each.came_s)[since:]
        found.append(fleet_model.summary(counted, 2))
    names = ("hit_rate", "hottest_over_mean")
    return {name: round(sum(each[name] for each in found) / _SALTS, 4) for name in names}


def _killed(
    servers: list[Server],
    url: str,
    files: Sequence[bytes],
    order: Sequence[int],
    clients: int,
    folder: Path,
) -> dict[str, Any]:
    """Kill the second server under load, start it again, and see whether its keys are back."""
    few = list(dict.fromkeys(order))[:_KEYS]
    before = _homes(url, files, few)
    load = Load(url, files, order, clients)
    thread = threading.Thread(target=load.run)
    thread.start()
    while len(load.answers) < len(order) // 4:
        time.sleep(0.05)
    for pid in servers[1].pids():
        os.kill(pid, signal.SIGKILL)
    thread.join()
    servers[1].stop()
    away = _homes(url, files, few)
    servers[1] = server("two", servers[1].port, folder)
    servers[1].wait_ready()
    time.sleep(5)  # haproxy's checks
    back = _homes(url, files, few)
    found = {
        "requests": len(order),
        "answered": len(load.answers),
        "visible_failures": load.failures,
        "failed_attempts": dict(load.failed_attempts),
        "keys": len(few),
        "keys_of_the_killed": sum(home == "two" for home in before.values()),
        "moved_without_need": sum(
            away[key] != home for key, home in before.items() if home == "one"
        ),
        "not_back": sum(back[key] != home for key, home in before.items()),
    }
    print("killed", found, flush=True)
    return found


def _homes(url: str, files: Sequence[bytes], pictures: Sequence[int]) -> dict[int, str]:
    """The server of each picture, when there is no other load."""
    load = Load(url, files, pictures).run()
    return {pictures[number]: home for number, home, _ in load.answers}


def _measured(requests: int, clients: int, folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(1)
    shares = fleet_model.popularity(_PICTURES, _ALPHA)
    order: list[int] = random.choice(_PICTURES, requests, p=shares).tolist()
    files, since = fleet_load.files(_PICTURES), requests // 3
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        servers: list[Server] = []
        stack.callback(stopped, servers)
        for name in ("one", "two"):
            servers.append(server(name, free_port(), folder))
            servers[-1].wait_ready()
        for policy in ("round robin", "affinity"):
            cleared(servers)
            with haproxy(servers, folder, round_robin=policy == "round robin") as url:
                found[policy] = Load(url, files, order, clients).run().summary(since)
                found[policy]["caches"] = [entries(each) for each in servers]
                print(policy, found[policy], flush=True)
                if policy == "affinity":
                    hot = Load(url, files, [0] * _HOT, clients).run().summary()
                    found["one picture"] = hot
                    found["killed"] = _killed(servers, url, files, order[:_KILLED], clients, folder)
    found["order"] = {
        "pictures": _PICTURES,
        "alpha": _ALPHA,
        "requests": requests,
        "clients": clients,
        "since": since,
    }
    room = found["entries_of_each_cache"] = _held(found["affinity"]["caches"])
    policies = {
        "round robin": fleet_model.round_robin,
        "affinity": fleet_model.by_rule(Rule(bound=1.5, floor=1)),
    }
    found["model"] = {
        name: _modelled(order, since, policy, room, clients) for name, policy in policies.items()
    }
    found["affinity_over_round_robin"] = {
        "measured": _ratio(found["affinity"], found["round robin"]),
        "model": _ratio(found["model"]["affinity"], found["model"]["round robin"]),
    }
    found["model_over_measured"] = {
        name: _ratio(found["model"][name], found[name]) for name in policies
    }
    return found


def _ratio(one: Any, other: Any) -> float:
    return round(float(one["hit_rate"]) / float(other["hit_rate"]), 3)


def _held(caches: Sequence[Any]) -> int:
    """How many pictures fit in the host tier of a server."""
    return max(int(cache["embeddings"]["host"]["entries"]) for cache in caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=_REQUESTS)
    parser.add_argument("--clients", type=int, default=_CLIENTS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    described = environment.describe()
    version = subprocess.run(
        [str(program("haproxy")), "-v"], capture_output=True, text=True, check=True
    ).stdout.partition("\n")[0]
    with tempfile.TemporaryDirectory() as folder:
        found = _measured(options.requests, options.clients, Path(folder))
    result = {"environment": described, "haproxy": version, "stubbed": "nothing", **found}
    today = datetime.datetime.now(tz=datetime.UTC).date()
    output = options.output or _ROOT / f"benchmarks/results/{today}-fleet.json"
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()

"""Two servers with the demo model behind haproxy: what affinity gives, and what a death costs.

    python -m benchmarks.fleet [--requests N] [--output FILE]

Clients ask about pictures whose popularity follows Zipf's law, one request after the other, more
pictures than the caches hold: with the configuration in `deploy/haproxy`, and with round robin in
its place. Then all ask about one picture, and one server is killed under load and started again.
The model of `benchmarks.scale` gets the same requests, so that the two can be compared. Times say
nothing here, since servers and clients share the machine; nothing is stubbed.
"""

import argparse
import datetime
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks import environment, fleet_model
from benchmarks.processes import Server, free_port
from saccade_client import Client
from server.scale.routing import Rule
from tests.services import program, running

_ROOT = Path(__file__).resolve().parent.parent
_PICTURES, _ALPHA, _SIDE = 400, 0.6, 224
_CLIENTS, _REQUESTS = 8, 1200
_CACHE_GIB = 0.004
_ADMIN_KEY = "benchmark"
_HOT = 200
_SALTS = 10
_SERVED_BY = "X-Served-By"


# ---------------------------------------------------------------------- servers and haproxy


def _server(name: str, port: int, folder: Path) -> Server:
    flags = ["--host", "127.0.0.1", "--port", str(port), "--no-files", "--admin-key", _ADMIN_KEY]
    flags += ["--max-model-len", "2048", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
    flags += ["--mm-processor-cache-gb", "1", "--embedding-cache-gb", str(_CACHE_GIB)]
    flags += ["--image-workers", "1"]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75"}
    command = [sys.executable, "-m", "server", "serve", *flags]
    return Server(name, command, port, "/ready", {**os.environ, **env}, folder / f"{name}.log")


def _stopped(servers: Sequence[Server]) -> None:
    for server in servers:
        server.stop()


def _configuration(round_robin: bool) -> str:
    """That of `deploy/haproxy`, without TLS, and with the server's name in each answer."""
    text = (_ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    changes = {
        'bind "${LISTEN}" ssl crt "${CERTIFICATE}"': 'bind "${LISTEN}"',
        "    default_backend saccade\n": "    default_backend saccade\n"
        f"    http-response set-header {_SERVED_BY} %s\n",
    }
    if round_robin:
        changes["    balance hdr(X-Session-ID)\n"] = "    balance roundrobin\n"
        changes["    hash-type consistent sdbm avalanche\n    hash-balance-factor 125\n"] = ""
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"deploy/haproxy/haproxy.cfg has no {old!r}")
        text = text.replace(old, new)
    return text


@contextmanager
def _haproxy(servers: Sequence[Server], folder: Path, *, round_robin: bool) -> Iterator[str]:
    """The URL of haproxy in front of the servers."""
    port = free_port()
    path = folder / f"haproxy-{port}.cfg"
    path.write_text(_configuration(round_robin))
    url = f"http://127.0.0.1:{port}"
    env = os.environ | {"LISTEN": f"127.0.0.1:{port}", "METRICS": f"127.0.0.1:{free_port()}"}
    for number, server in enumerate(servers, 1):
        env[f"BACKEND_{number}"] = f"127.0.0.1:{server.port}"

    def ready() -> bool:
        return httpx.get(f"{url}/v1/models").status_code == httpx.codes.OK

    command: list[str | Path] = [program("haproxy"), "-db", "-f", path]
    with running(command, ready=ready, env=env, log=folder / "haproxy.log"):
        yield url


def _cleared(servers: Sequence[Server]) -> None:
    for server in servers:
        url = f"http://127.0.0.1:{server.port}/v1/cache"
        headers = {"Authorization": f"Bearer {_ADMIN_KEY}"}
        httpx.delete(url, headers=headers, timeout=30).raise_for_status()


def _entries(server: Server) -> Any:
    """What the host tier of the embedding cache holds."""
    _, body = server.get("/v1/cache", key=_ADMIN_KEY)
    return json.loads(body)


# ---------------------------------------------------------------------- clients


class _Counting(httpx.HTTPTransport):
    """Notes how each attempt of a request ended."""

    def __init__(self, noted: "Load") -> None:
        super().__init__()
        self._noted = noted

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = super().handle_request(request)
        except httpx.TransportError as error:
            self._noted.failed_attempts[type(error).__name__] += 1
            raise
        # Behind haproxy there is no /version, which clients ask for first.
        if response.status_code != httpx.codes.OK and request.method == "POST":
            self._noted.failed_attempts[str(response.status_code)] += 1
        return response


@dataclass
class Load:
    """Clients that send requests about a list of pictures, in its order, each when it is free."""

    url: str
    files: Sequence[bytes]
    order: Sequence[int]
    clients: int = _CLIENTS
    # (number in the order, server, how far the picture was cached, seconds) of each answer.
    answers: list[tuple[int, str, str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed_attempts: Counter[str] = field(default_factory=Counter)
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> "Load":
        threads = [threading.Thread(target=self._client) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def _client(self) -> None:
        with Client(f"{self.url}/v1", model="saccade-tiny", resize=False, reuse=False) as client:
            transport = _Counting(self)
            client.__dict__["_http"] = httpx.Client(transport=transport, timeout=120)
            while (number := self._take()) is not None:
                begun = time.monotonic()
                try:
                    picture = self.files[self.order[number]]
                    answer = client.ask(
                        "What is in the image?", picture, max_tokens=1, include_image_details=True
                    )
                except Exception as error:
                    self.failures.append(repr(error))
                    continue
                (image,) = answer.images
                took = time.monotonic() - begun
                server = answer.headers[_SERVED_BY]
                self.answers.append((number, server, str(image.cached), took))

    def _take(self) -> int | None:
        with self._lock:
            if self._next == len(self.order):
                return None
            self._next += 1
            return self._next - 1

    def summary(self, since: int = 0) -> dict[str, Any]:
        """Of the requests from `since` on: hit rate, and the load of the hottest server."""
        counted = [answer for answer in self.answers if answer[0] >= since]
        served = Counter(server for _, server, _, _ in counted)
        hits = sum(cached == "embedding" for _, _, cached, _ in counted)
        return {
            "requests": len(counted),
            "hit_rate": round(hits / len(counted), 4),
            "hottest_over_mean": round(2 * max(served.values()) / len(counted), 3),
            "failures": self.failures,
            "failed_attempts": dict(self.failed_attempts),
        }


def _files() -> list[bytes]:
    """Pictures of one size that differ."""
    found = []
    for seed in range(_PICTURES):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((_SIDE, _SIDE))
        file = io.BytesIO()
        image.save(file, "PNG")
        found.append(file.getvalue())
    return found


# ---------------------------------------------------------------------- what is measured


def _modelled(
    order: Sequence[int], since: int, policy: fleet_model.Choose, entries: int
) -> dict[str, float]:
    """The same requests in the model: each client sends the next when its last is answered. Which
    pictures fall to which replica differs from haproxy's ring, so this is the mean of several."""
    found = []
    for salt in range(_SALTS):
        fleet = fleet_model.Fleet([1.0, 1.0], policy, entries=entries)
        pictures = [f"{salt} picture {n}" for n in order]
        done = fleet_model.run_closed(fleet, pictures, _CLIENTS)
        counted = sorted(done, key=lambda each: each.came_s)[since:]
        found.append(fleet_model.summary(counted, 2))
    names = ("hit_rate", "hottest_over_mean")
    return {name: round(sum(each[name] for each in found) / _SALTS, 4) for name in names}


def _killed(
    servers: list[Server], url: str, files: Sequence[bytes], order: Sequence[int], folder: Path
) -> dict[str, Any]:
    """Kill the second server under load, start it again, and see whether its keys are back."""
    few = list(dict.fromkeys(order))[:60]
    before = _homes(url, files, few)
    load = Load(url, files, order)
    thread = threading.Thread(target=load.run)
    thread.start()
    while len(load.answers) < len(order) // 4:
        time.sleep(0.05)
    for pid in servers[1].pids():
        os.kill(pid, signal.SIGKILL)
    thread.join()
    servers[1].stop()
    away = _homes(url, files, few)
    servers[1] = _server("two", servers[1].port, folder)
    servers[1].wait_ready()
    time.sleep(5)  # haproxy's checks
    back = _homes(url, files, few)
    found = {
        "requests": len(order),
        "answered": len(load.answers),
        "visible_failures": load.failures,
        "failed_attempts": dict(load.failed_attempts),
        "clients": _CLIENTS,
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
    load = Load(url, files, pictures, clients=1).run()
    return {pictures[number]: server for number, server, _, _ in load.answers}


def _measured(requests: int, folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(1)
    shares = fleet_model.popularity(_PICTURES, _ALPHA)
    order: list[int] = random.choice(_PICTURES, requests, p=shares).tolist()
    files, since = _files(), requests // 3
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        servers: list[Server] = []
        stack.callback(_stopped, servers)
        for name in ("one", "two"):
            servers.append(_server(name, free_port(), folder))
            servers[-1].wait_ready()
        for policy in ("round robin", "affinity"):
            _cleared(servers)
            with _haproxy(servers, folder, round_robin=policy == "round robin") as url:
                found[policy] = Load(url, files, order).run().summary(since)
                found[policy]["caches"] = [_entries(server) for server in servers]
                print(policy, found[policy], flush=True)
                if policy == "affinity":
                    hot = Load(url, files, [0] * _HOT).run().summary()
                    found["one picture"] = hot
                    found["killed"] = _killed(servers, url, files, order[:600], folder)
    found["order"] = {"pictures": _PICTURES, "alpha": _ALPHA, "requests": requests, "since": since}
    entries = _held(found["affinity"]["caches"])
    found["entries_of_each_cache"] = entries
    policies = {
        "round robin": fleet_model.round_robin,
        "affinity": fleet_model.by_rule(Rule(floor=1)),
    }
    found["model"] = {
        name: _modelled(order, since, policy, entries) for name, policy in policies.items()
    }
    ratios = [found[name]["hit_rate"] for name in ("affinity", "round robin")]
    found["affinity_over_round_robin"] = round(ratios[0] / ratios[1], 3)
    return found


def _held(caches: Sequence[Any]) -> int:
    """How many pictures fit in the host tier of a server."""
    return max(int(cache["embeddings"]["host"]["entries"]) for cache in caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=_REQUESTS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    described = environment.describe()
    version = subprocess.run(
        [str(program("haproxy")), "-v"], capture_output=True, text=True, check=True
    ).stdout.partition("\n")[0]
    with tempfile.TemporaryDirectory() as folder:
        found = _measured(options.requests, Path(folder))
    result = {"environment": described, "haproxy": version, "stubbed": "nothing", **found}
    today = datetime.datetime.now(tz=datetime.UTC).date()
    output = options.output or _ROOT / f"benchmarks/results/{today}-fleet.json"
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()

"""A server under more requests than it can answer: goodput, refusals, health, memory, fairness.

    python -m benchmarks.overload --output FILE [--plain] [--stub-encoder]

Goodput is the number of answers per second that are complete within the clients' time limit and
within the measurement. Capacity is the goodput of a closed loop. Then requests arrive at a multiple
of that rate. At the end, a key with few requests is measured alone, while another key sends that
flood, and while that key has a limit on its concurrency besides.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.measure import in_process, milliseconds
from benchmarks.open_load import Outcome, Plan, Source
from benchmarks.probes import HealthProbe, MemoryProbe
from benchmarks.processes import Server, free_port
from benchmarks.workloads import WORKLOADS, Bodies

_ROOT = Path(__file__).resolve().parent.parent
_STUB_FOLDER = _ROOT / "benchmarks" / "stub_encoder"
_KEYS_READ_S = 3.0  # after this time, the server has read a changed file of keys
# Bodies for a closed loop: more than any server here answers in a second.
_MOST_PER_SECOND = 150


class Bench:
    """One server, and the files of the requests that it gets."""

    def __init__(self, server: Server, bodies: Bodies, options: argparse.Namespace) -> None:
        self._server = server
        self._bodies = bodies
        self._options = options
        self._workload = WORKLOADS[options.workload]

    def capacity(self) -> dict[str, Any]:
        """A closed loop of as many clients as the server answers at the same time."""
        options = self._options
        count = round(_MOST_PER_SECOND * options.seconds)
        return self._drive([self._source("heavy", count, clients=options.clients)])["heavy"]

    def overload(self, rate: float) -> dict[str, Any]:
        """Requests of one key that arrive at `rate`."""
        return self._drive([self._source("heavy", self._count(rate), rate=rate)])["heavy"]

    def light(self, flood: float) -> dict[str, Any]:
        """Requests of a light key, alone or together with a flood of another."""
        rate = self._options.light_rate
        sources = [self._source("light", self._count(rate), rate=rate)]
        if not flood:
            return self._drive(sources)["light"]
        sources.append(self._source("heavy", self._count(flood), rate=flood))
        rows = self._drive(sources)
        heavy = ("goodput", "refused", "refused_p50_ms", "refused_p99_ms", "others")
        return rows["light"] | {"flood": {name: rows["heavy"][name] for name in heavy}}

    def _count(self, rate: float) -> int:
        expected = rate * self._options.seconds
        return round(expected + 5 * expected**0.5) + 1

    def _source(self, name: str, count: int, rate: float = 0.0, clients: int = 0) -> Source:
        batch = self._bodies.round(self._workload, count)
        files = [str(body) for body in batch.bodies]
        return Source(name, f"sk-{name}", files, self._options.seconds, rate, clients)

    def _drive(self, sources: list[Source]) -> dict[str, dict[str, Any]]:
        plan = Plan(self._server.port, sources, self._options.timeout_s)
        memory, health = MemoryProbe(self._server), HealthProbe(self._server)
        with memory, health:
            outcomes = _generate(plan)
        for source in sources:
            for body in source.bodies:
                Path(body).unlink()
        shared = {
            "health_p99_ms": milliseconds(health.latencies, 0.99),
            "health_failures": health.failures,
            "peak_memory_mb": round(memory.peak / 1e6),
        }
        return {
            source.name: _summary([o for o in outcomes if o.source == source.name], source) | shared
            for source in sources
        }


def main() -> None:
    """Measure the server, and plain vLLM if wanted, and save what was measured."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    servers = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name in ("ours", "plain") if options.plain else ("ours",):
            servers[name] = _measured(name, Path(folder), options)
    result = {
        "what": "overload",
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "stubbed": ["vision encoder"] if options.stub_encoder else [],
        **environment.describe(),
        "servers": servers,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _measured(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        server = _start(name, folder, options)
        stack.callback(server.stop)
        server.wait_ready()
        model = json.loads(server.get("/v1/models", "sk-light")[1])["data"][0]["id"]
        bench = Bench(server, Bodies(folder, model), options)
        bench.capacity()  # warms up
        measured: dict[str, Any] = {"capacity": [], "overload": [], "light": []}
        measured |= {"flooded": [], "limited": []}

        def note(kind: str, row: dict[str, Any]) -> dict[str, Any]:
            measured[kind].append(row)
            print(name, kind, json.dumps(row), flush=True)
            return row

        rate = 0.0
        for _ in range(options.rounds):
            capacity = note("capacity", bench.capacity())["goodput"]
            rate = options.factor * capacity
            note("overload", bench.overload(rate))
        for _ in range(options.rounds if name == "ours" else 0):
            note("light", bench.light(0.0))
            note("flooded", bench.light(rate))
            _write_keys(folder, {"concurrency": options.concurrency_limit})
            note("limited", bench.light(rate))
            _write_keys(folder, {})
    return measured


def _start(name: str, folder: Path, options: argparse.Namespace) -> Server:
    keys = _write_keys(folder, {})
    port = free_port()
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if options.engine_cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = options.engine_cores
    if options.stub_encoder:
        env["STUB_ENCODER_REPORT"] = str(folder)
        env["PYTHONPATH"] = str(_STUB_FOLDER)
    command = ["-m", "server", "serve", options.model, "--api-keys-file", str(keys)]
    if name == "plain":
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    flags = ["--port", str(port), "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "8192", "--max-num-seqs", str(options.max_num_seqs)]
    flags += ["--mm-processor-cache-gb", "1", "--disable-uvicorn-access-log"]
    flags += options.flags.split() if name == "ours" else []
    ready = "/health" if name == "plain" else "/ready"
    log = folder / f"{name}.log"
    return Server(name, [sys.executable, *command, *flags], port, ready, env, log)


def _write_keys(folder: Path, limits: dict[str, int]) -> Path:
    """Write the file of keys, with `limits` for the key that floods, and wait until it is read."""
    keys = folder / "keys.json"
    is_new = not keys.exists()
    heavy = {"keys": ["sk-heavy"], **limits}
    keys.write_text(json.dumps({"groups": {"heavy": heavy, "light": ["sk-light"]}}))
    if not is_new:
        time.sleep(_KEYS_READ_S)
    return keys


def _generate(plan: Plan) -> list[Outcome]:
    printed = in_process("benchmarks.open_load", plan)
    return [Outcome(**fields) for fields in json.loads(printed)]


def _summary(outcomes: list[Outcome], source: Source) -> dict[str, Any]:
    good = [each.total_s for each in outcomes if each.complete]
    in_time = sum(each.complete and each.at_s <= source.seconds for each in outcomes)
    refused = [each for each in outcomes if each.status in (429, 503)]
    others = Counter(
        f"{each.status} {each.code}"
        for each in outcomes
        if not each.complete and each not in refused
    )
    return {
        "sent": len(outcomes),
        "answered": len(good),
        "goodput": round(in_time / source.seconds, 2),
        "answered_p50_ms": milliseconds(good, 0.5),
        "answered_p95_ms": milliseconds(good, 0.95),
        "refused": len(refused),
        "refused_p50_ms": milliseconds([each.first_byte_s for each in refused], 0.5),
        "refused_p99_ms": milliseconds([each.first_byte_s for each in refused], 0.99),
        "refused_without_retry_after": sum(not each.retry_after for each in refused),
        "others": dict(others),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--model", default="server/demo")
    add("--workload", default="small", choices=sorted(WORKLOADS))
    add("--plain", action="store_true", help="measure plain vLLM as well, afterwards")
    add("--stub-encoder", action="store_true", help="use a stub of the vision encoder")
    add("--engine-cores", help="cores for the model's threads (CPU only), such as 1")
    add("--flags", default="", help="more flags for our server, as one string")
    add("--concurrency-limit", type=int, default=2, help="of the flooding key, when it has one")
    add("--max-num-seqs", type=int, default=8)
    add("--clients", type=int, default=16, help="of the closed loop that measures the capacity")
    add("--factor", type=float, default=5.0, help="overload, as a multiple of the capacity")
    add("--seconds", type=float, default=30.0, help="duration of each measurement")
    add("--timeout-s", type=float, default=10.0, help="clients give up after so long")
    add("--light-rate", type=float, default=1.0, help="requests per second of the light key")
    add("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

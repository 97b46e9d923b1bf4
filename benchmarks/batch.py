"""A batch beside interactive requests: what each of them costs the other.

    python -m benchmarks.batch --output FILE

Requests of one user arrive at random times, alone and while the server works on a batch of a
thousand requests. The batch is also measured alone. All ask about small pictures, each of which is
new. Times are those of whole answers; a round compares measurements that follow one another.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks import environment
from benchmarks.measure import in_process, milliseconds
from benchmarks.open_load import Outcome, Plan, Source
from benchmarks.processes import Server, free_port
from benchmarks.workloads import WORKLOADS, Bodies

_PATH = "/v1/chat/completions"
_TIMEOUT_S = 60.0
_POLL_S = 0.05
_OVER = ("completed", "failed", "expired", "cancelled")


class Bench:
    """One server, and the files of the requests that it gets."""

    def __init__(self, server: Server, bodies: Bodies, options: argparse.Namespace) -> None:
        self._port = server.port
        self._bodies = bodies
        self._options = options
        self._web = httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=_TIMEOUT_S)

    def interactive(self) -> dict[str, Any]:
        """The latency of requests that arrive at the given rate."""
        options = self._options
        count = round(options.rate * options.seconds * 2) + 10
        files = self._files(count)
        source = Source("user", "none", list(map(str, files)), options.seconds, options.rate)
        printed = in_process("benchmarks.open_load", Plan(self._port, [source], _TIMEOUT_S))
        outcomes = [Outcome(**fields) for fields in json.loads(printed)]
        for file in files:
            file.unlink()
        good = [each.total_s for each in outcomes if each.complete]
        return {
            "requests": len(outcomes),
            "failures": len(outcomes) - len(good),
            "p50_ms": milliseconds(good, 0.5),
            "p95_ms": milliseconds(good, 0.95),
        }

    def batch_alone(self) -> dict[str, Any]:
        """The throughput of a batch that has the server for itself."""
        batch = self._begun()
        rate, _ = self._rate(batch, lambda: self._until(batch, lambda now: now["status"] in _OVER))
        over = self._get(batch)
        assert over["request_counts"]["completed"] == self._options.requests, over
        return {"requests_per_s": rate, "tokens": over["usage"]["total_tokens"]}

    def beside(self) -> dict[str, Any]:
        """Both together. What is left of the batch is cancelled."""
        batch = self._begun()
        rate, measured = self._rate(batch, self.interactive)
        assert self._get(batch)["status"] == "in_progress", "the batch ended too early"
        self._web.post(f"/v1/batches/{batch}/cancel").raise_for_status()
        self._until(batch, lambda now: now["status"] in _OVER)
        return {**measured, "batch_requests_per_s": rate}

    def _rate(self, batch: str, work: Callable[[], Any]) -> tuple[float, Any]:
        """How many requests of the batch per second are answered during `work`."""
        before, began = self._answered(batch), time.monotonic()
        result = work()
        seconds = time.monotonic() - began
        return round((self._answered(batch) - before) / seconds, 2), result

    def _answered(self, batch: str) -> int:
        count: int = self._get(batch)["request_counts"]["completed"]
        return count

    def _begun(self) -> str:
        """The id of a batch whose first requests are answered."""
        lines = b"".join(self._lines())
        form = {"file": ("in.jsonl", lines)}
        upload = self._web.post("/v1/files", files=form, data={"purpose": "batch"})
        given = {"endpoint": _PATH, "completion_window": "24h"}
        made = self._web.post(
            "/v1/batches", json={**given, "input_file_id": upload.raise_for_status().json()["id"]}
        )
        batch: str = made.raise_for_status().json()["id"]
        self._until(batch, lambda now: now["request_counts"]["completed"] > 0)
        return batch

    def _lines(self) -> Iterator[bytes]:
        for number, file in enumerate(self._files(self._options.requests)):
            body = json.loads(file.read_bytes())
            del body["stream"], body["stream_options"]
            line = {"custom_id": str(number), "method": "POST", "url": _PATH, "body": body}
            yield json.dumps(line).encode() + b"\n"
            file.unlink()

    def _files(self, count: int) -> list[Path]:
        return self._bodies.round(WORKLOADS[self._options.workload], count).bodies

    def _get(self, batch: str) -> dict[str, Any]:
        found: dict[str, Any] = self._web.get(f"/v1/batches/{batch}").raise_for_status().json()
        return found

    def _until(self, batch: str, is_reached: Callable[[dict[str, Any]], bool]) -> None:
        while not is_reached(found := self._get(batch)):
            assert found["status"] not in _OVER, found
            time.sleep(_POLL_S)


def main() -> None:
    """Measure a server, and save what was measured."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        measured = _measured(Path(folder), options)
    result = {
        "what": "batch",
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        **environment.describe(),
        **measured,
        "summary": _summary(measured),
    }
    print(json.dumps(result["summary"]))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _measured(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    with ExitStack() as stack:
        server = _start(folder, options)
        stack.callback(server.stop)
        server.wait_ready()
        model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        bench = Bench(server, Bodies(folder, model), options)
        bench.interactive()  # warms up
        measured: dict[str, list[dict[str, Any]]] = {"alone": [], "beside": [], "batch_alone": []}

        def note(kind: str, row: dict[str, Any]) -> None:
            measured[kind].append(row)
            print(kind, json.dumps(row), flush=True)

        for _ in range(options.rounds):
            note("alone", bench.interactive())
            note("beside", bench.beside())
        note("batch_alone", bench.batch_alone())
    return measured


def _start(folder: Path, options: argparse.Namespace) -> Server:
    port = free_port()
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    command = [sys.executable, "-m", "server", "serve", options.model, *options.flags.split()]
    flags = ["--port", str(port), "--max-model-len", "4096", "--disable-uvicorn-access-log"]
    flags += ["--files-dir", str(folder / "files")]
    return Server("ours", [*command, *flags], port, "/ready", env, folder / "ours.log")


def _summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians of the rounds, and of their ratios."""

    def ratio(name: str) -> float:
        pairs = zip(measured["beside"], measured["alone"], strict=True)
        return round(statistics.median(a[name] / b[name] for a, b in pairs), 2)

    rates = [row["batch_requests_per_s"] for row in measured["beside"]]
    alone = measured["batch_alone"][0]["requests_per_s"]
    return {
        "p50_ratio": ratio("p50_ms"),
        "p95_ratio": ratio("p95_ms"),
        "batch_rate_ratio": round(statistics.median(rates) / alone, 2),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--model", default="server/demo")
    add("--workload", default="small", choices=sorted(WORKLOADS))
    add("--flags", default="", help="more flags for the server, as one string")
    add("--requests", type=int, default=1000, help="of the batch")
    add("--rate", type=float, default=2.0, help="interactive requests per second")
    add("--seconds", type=float, default=15.0, help="duration of each interactive measurement")
    add("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Mixed traffic with faults for a long time: does a server use more afterwards than before?

    python -m benchmarks.soak [--minutes 30] [--output FILE]
    python -m benchmarks.soak --plot FILE         draws the plot of a result again

Clients send text, photos, PDFs, animations, clips and uploads in all dialects, hostile files,
refused bodies and URLs of hostile origins, and some leave early. Meanwhile image workers and the
forkserver are killed or stopped, the engine is stopped, and Redis hangs or is restarted.

First, `--warm-up-s` of the same load from four times as many clients fills all caches, which are
small here, and starts the threads of pools. Then the server rests for `--settle-s`, and memory,
open files, threads, segments and processes are noted; the same again after the soak. The exit
status is 1 if the server has more of anything than before, or if a request got a 5xx other than
503, an answer that its kind must not get, or none within two minutes.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import environment, soak_plot
from benchmarks.processes import Server, ServerFailed, free_port
from benchmarks.redis_server import RedisServer, redis_server
from benchmarks.soak_faults import faults, injection
from benchmarks.soak_files import Files, behaviours
from benchmarks.soak_requests import MODEL
from benchmarks.soak_samples import Sample, growth, left_over, sample, slopes
from benchmarks.soak_traffic import traffic
from tests.hostile_origin import HostileOrigin

_INTERVAL_S = 5.0
_WARM_UP_CLIENTS = 4  # times as many: a pool starts a thread when all of its threads are busy
# All caches are small, so that the warm-up fills them, and limits short, so that they are reached.
_FLAGS = (
    *("--served-model-name", MODEL, "--enforce-eager", "--dtype", "float32"),
    *("--max-model-len", "8192", "--num-gpu-blocks-override", "256", "--allow-private-media"),
    *("--mm-processor-cache-gb", "0.02", "--embedding-cache-gb", "0.05"),
    *("--fetch-cache-gb", "0.02"),
    *("--embedding-cache-disk-gb", "0.05", "--files-gb", "0.1"),
    *("--max-image-bytes", str(8 << 20), "--fetch-timeout-s", "2", "--pdf-page-timeout-s", "1"),
    *("--image-timeout-s", "10", "--image-workers", "2", "--video-timeout-s", "20"),
)
_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",  # a matrix product for each layer and prompt length
}


def main() -> None:
    """Run the soak, print its verdict, and save the result and its plot."""
    options = _arguments()
    if options.plot is not None:
        soak_plot.plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    described = environment.describe()  # of the running commit, not of a later one
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        redis_server() as redis,
        HostileOrigin() as origin,
    ):
        files = Files()
        origin.routes |= behaviours(files)
        run = _Run(options, Path(folder), redis, origin, files)
        try:
            result = run.go()
        except ServerFailed:
            options.output.write_text(json.dumps({**described, **run.samples()}, indent=1) + "\n")
            raise
    named = {name: str(value) for name, value in vars(options).items()}
    result = {"what": "soak", **described, "options": named, "flags": _FLAGS, **result}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    soak_plot.plot(result, options.output.with_suffix(".png"))
    print(json.dumps({key: result[key] for key in _PRINTED}, indent=1))
    sys.exit(1 if result["grown"] or result["traffic"]["failures"] else 0)


_PRINTED = ("grown", "mib_per_hour", "left_over", "exit_status", "traffic")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--warm-up-s", type=float, default=360)
    parser.add_argument("--settle-s", type=float, default=60)
    parser.add_argument("--concurrency", type=int, default=3, help="clients at a time")
    parser.add_argument("--pause-s", type=float, default=0.2, help="of a client between requests")
    parser.add_argument("--fault-interval-s", type=float, default=45)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak.json"))
    parser.add_argument("--plot", type=Path, help="draw the plot of this result")
    return parser.parse_args()


class _Run:
    """One server, from its start to its end."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        redis: RedisServer,
        origin: HostileOrigin,
        files: Files,
    ) -> None:
        self._options, self._folder = options, folder
        self._redis, self._origin, self._files = redis, origin, files
        self._began = time.monotonic()
        self._samples: list[Sample] = []

    def go(self) -> dict[str, Any]:
        with self._serving() as server:
            warm_up, _ = self._load(
                server, self._options.warm_up_s, self._options.warm_up_s / 9, _WARM_UP_CLIENTS
            )
            before = self._settled(server)
            started = len(self._samples)
            outcomes, injected = self._load(
                server, self._options.minutes * 60, self._options.fault_interval_s
            )
            loaded = self._samples[started:]
            after = self._settled(server)
            status = server.end()
        return {
            "grown": growth(before, after),
            "mib_per_hour": slopes(loaded),
            "left_over": left_over(self._tmp),
            "exit_status": status,
            "warm_up": warm_up,
            "traffic": outcomes,
            "before": before.as_json(),
            "after": after.as_json(),
            "faults": injected,
            **self.samples(),
        }

    def samples(self) -> dict[str, Any]:
        """What has been measured so far."""
        return {"samples": [each.as_json() for each in self._samples]}

    @property
    def _tmp(self) -> Path:
        return self._folder / "tmp"

    @contextlib.contextmanager
    def _serving(self) -> Iterator[Server]:
        port = free_port()
        for name in ("tmp", "files", "embeddings"):
            (self._folder / name).mkdir()
        folders = ("--files-dir", "files", "--embedding-cache-dir", "embeddings")
        stores = [
            value if value.startswith("-") else str(self._folder / value) for value in folders
        ]
        server = Server(
            "soak",
            [
                *(sys.executable, "-m", "server", "serve", "server/demo", "--port", str(port)),
                *(*_FLAGS, *stores, "--embedding-cache-url", self._redis.url()),
            ],
            port,
            "/ready",
            {**os.environ, **_VARIABLES, "TMPDIR": str(self._tmp)},
            self._options.output.with_suffix(".log"),
        )
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()

    def _load(
        self, server: Server, seconds: float, fault_interval_s: float, times: int = 1
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Traffic of `times` as many clients, and faults, for so long; their outcomes, and the
        faults."""
        until = time.monotonic() + seconds
        concurrency, pause_s = times * self._options.concurrency, self._options.pause_s
        with (
            traffic(server.port, concurrency, pause_s, self._files, self._origin) as outcomes,
            injection(faults(server, self._redis), fault_interval_s, self._began) as injected,
        ):
            self._watch(server, until)
        return outcomes.as_json(), [asdict(fault) for fault in injected]

    def _settled(self, server: Server) -> Sample:
        self._watch(server, time.monotonic() + self._options.settle_s)
        return sample(server, self._began, self._tmp, thorough=True)

    def _watch(self, server: Server, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            server.check()
            self._samples.append(sample(server, self._began, self._tmp))
            time.sleep(min(_INTERVAL_S, left))


if __name__ == "__main__":
    main()

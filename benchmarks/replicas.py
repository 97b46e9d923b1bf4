"""Two engines on this machine, as replicas (`--replicas 2`) and by data parallelism
(`--data-parallel-size 2`): what a repeated picture costs.

    python -m benchmarks.replicas [--rounds N] [--output FILE]

Clients ask about a few photos again and again, in random order. All embeddings fit in the caches.
The first round is not counted: it fills the caches with what the router lets them have. CPU times
are of all processes of the server; times say nothing, since servers and clients share the machine.
Nothing is stubbed.
"""

import argparse
import datetime
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.fleet_load import Load
from benchmarks.photos import photo
from benchmarks.processes import Server, free_port

_ROOT = Path(__file__).resolve().parent.parent
_WAYS = {
    "replicas": ["--replicas", "2"],
    "data parallelism": ["--data-parallel-size", "2"],
}
_PHOTOS, _SIZE, _ROUNDS, _CLIENTS = 24, (1280, 960), 8, 8


def _server(name: str, folder: Path) -> Server:
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--no-files", *_WAYS[name]]
    flags += ["--max-model-len", "4096", "--max-num-seqs", "16", "--image-workers", "1"]
    flags += ["--mm-processor-cache-gb", "1", "--embedding-cache-gb", "0.5"]
    # A prompt whose beginning is known needs no embedding.
    flags += ["--no-enable-prefix-caching", "--drain-delay-s", "0"]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "server", "serve", *flags]
    return Server(name, command, port, "/ready", {**os.environ, **env}, folder / f"{name}.log")


def _measured(name: str, files: list[bytes], rounds: int, folder: Path) -> dict[str, Any]:
    server = _server(name, folder)
    try:
        server.wait_ready()
        url = f"http://127.0.0.1:{server.port}"
        shuffled = random.Random(1)
        everything = list(range(len(files)))
        Load(url, files, everything, _CLIENTS).run()
        order = [n for _ in range(rounds) for n in shuffled.sample(everything, len(files))]
        before = server.cpu()
        load = Load(url, files, order, _CLIENTS).run()
        used = server.cpu() - before
    finally:
        server.stop()
    if load.failures:
        raise RuntimeError(f"{name}: {load.failures[0]}")
    cached = Counter(answer[2] for answer in load.answers)
    found = {
        "requests": len(order),
        "cached": {kind: cached[kind] for kind in ("embedding", "features", "none")},
        "cpu_ms": {
            "total": round(1e3 * used.total / len(order), 2),
            "front_end": round(1e3 * used.front_end / len(order), 2),
            "engine": round(1e3 * used.engine / len(order), 2),
        },
    }
    print(name, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    described = environment.describe()
    files = [photo(*_SIZE, seed) for seed in range(_PHOTOS)]
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: _measured(name, files, options.rounds, Path(folder)) for name in sorted(_WAYS)
        }
    result = {
        "environment": described,
        "stubbed": "nothing",
        "photos": {"count": _PHOTOS, "size": _SIZE},
        "clients": _CLIENTS,
        **found,
    }
    today = datetime.datetime.now(tz=datetime.UTC).date()
    output = options.output or _ROOT / f"benchmarks/results/{today}-replicas.json"
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

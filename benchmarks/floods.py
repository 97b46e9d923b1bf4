"""A server under floods: what is answered, how fast the rest is refused, health, and memory.

    python -m benchmarks.floods --output FILE [--only NAME,...]

Each flood is a number of requests or connections that all begin at the same time. Memory is that of
all processes of the server (PSS): before, at the peak, and some time after each flood. Floods that
FILE has already stay there, so that they can be measured in several runs.

Clients share the cores with the server here. So the flood has the usual priority only until its
heads are sent, and after that runs when nothing else wants to (SCHED_IDLE); the time of an answer
is that at which the kernel got it. /health is asked at the usual priority, every 50 ms. Each row
has verdicts: refusals within 100 ms (p99), /health within 50 ms (p99), and the peak of the memory
below the sum of the server's bounds (docs/admission.md).
"""

import argparse
import base64
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import environment, large_pictures, photos
from benchmarks.flood_load import Outcome, Plan
from benchmarks.measure import in_process, milliseconds
from benchmarks.probes import HealthProbe, MemoryProbe
from benchmarks.processes import Server, free_port, proportional
from server.concurrency import usable_memory
from server.settings import GIB, MIB, Settings

_ROOT = Path(__file__).resolve().parent.parent
_MOST_REFUSED_MS, _MOST_HEALTH_MS = 100.0, 50.0
_PROCESSOR_CACHE_GB = 1
# The bounds of docs/admission.md that are no settings: for a connection, and a page of a PDF.
_CONNECTION_BYTES, _PAGE_BYTES = 0.3 * MIB, 512 * MIB
_MEMORY_PER_CONNECTION = 5 * MIB


@dataclass(frozen=True, slots=True)
class Flood:
    """`pictures` gives the pictures of each request, for floods of chats."""

    what: str
    kind: str
    count: int
    seconds: float
    pictures: Callable[[], list[bytes]] | None = None


def _large_bmp() -> list[bytes]:
    pixels = np.random.default_rng(1).integers(0, 256, (3000, 4100, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return [file.getvalue()]


FLOODS = {
    "photos": Flood(
        "500 chats with a JPEG of 12 MP", "chat", 500, 40, lambda: [photos.photo(4000, 3000, 1)]
    ),
    "large_pngs": Flood(
        "500 chats with a PNG of 100 MP",
        "chat",
        500,
        40,
        lambda: [large_pictures.makers()["PNG RGB 8"]()],
    ),
    "large_bodies": Flood("500 chats with a body of 49 MB", "chat", 500, 40, _large_bmp),
    "announced_bodies": Flood(
        "500 heads that announce a body of 49 MB", "announced", 500, 10, _large_bmp
    ),
    "many_pictures": Flood(
        "500 chats with 20 JPEGs of 1920x1080",
        "chat",
        500,
        40,
        lambda: 20 * [photos.photo(1920, 1080, 1)],
    ),
    "slow_bodies": Flood("500 bodies at 100 bytes/s", "slow_body", 500, 40),
    "slow_headers": Flood("500 heads of a field per second", "slow_headers", 500, 30),
    "endless_headers": Flood("100 heads without an end", "endless_headers", 100, 10),
    "long_urls": Flood("100 URLs of 30 MB", "long_url", 100, 10),
    "idle": Flood("10,000 idle connections", "idle", 10_000, 30),
    "never_reads": Flood("500 clients that never read 32 large answers", "never_reads", 500, 30),
}


def main() -> None:
    """Run the floods one after the other against one server; save what was measured."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        command, server = _start(Path(folder), options)
        try:
            server.wait_ready()
            _run(server, FLOODS["photos"], Path(folder), 4, 0.0)  # warms up
            for name in options.only or FLOODS:
                rows[name] = _run(server, FLOODS[name], Path(folder), None, options.settle_s)
                print(name, json.dumps(rows[name]), flush=True)
        finally:
            server.stop()
    before = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = before.get("floods", {}) | rows
    result = {
        "what": "floods",
        "command": command,
        "generator": "heads at the usual priority, bodies and reading as SCHED_IDLE; answers are "
        "timed by the kernel",
        "targets": {"refused_p99_ms": _MOST_REFUSED_MS, "health_p99_ms": _MOST_HEALTH_MS},
        **environment.describe(),
        "settle_s": options.settle_s,
        "floods": {name: rows[name] for name in FLOODS if name in rows},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["floods"].values():
        print(_line(row))


def _start(folder: Path, options: argparse.Namespace) -> tuple[list[str], Server]:
    port = free_port()
    flags = ["--port", str(port), "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "8192", "--max-num-seqs", "8"]
    flags += ["--mm-processor-cache-gb", str(_PROCESSOR_CACHE_GB)]
    flags += ["--disable-uvicorn-access-log", *options.flags.split()]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if options.engine_cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = options.engine_cores
    command = ["-m", "server", "serve", options.model, *flags]
    log = folder / "server.log"
    return command, Server("ours", [sys.executable, *command], port, "/ready", env, log)


def _run(
    server: Server, flood: Flood, folder: Path, count: int | None, settle_s: float
) -> dict[str, Any]:
    parts = _parts(flood.pictures(), folder) if flood.pictures else []
    plan = Plan(server.port, flood.kind, count or flood.count, flood.seconds, parts)
    before = proportional(server.pids())
    memory, health = MemoryProbe(server), HealthProbe(server)
    with memory, health:
        outcomes = _generate(plan)
    time.sleep(settle_s)
    after = proportional(server.pids())
    refused = [o.answered_s for o in outcomes if o.status != "200" and o.answered_s is not None]
    row = {
        "what": flood.what,
        "count": plan.count,
        "answers": dict(Counter(f"{o.status} {o.code}".strip() or o.ended for o in outcomes)),
        "left_open": sum(o.ended == "open" for o in outcomes),
        "refused_p50_ms": milliseconds(refused, 0.5),
        "refused_p99_ms": milliseconds(refused, 0.99),
        "health_p50_ms": milliseconds(health.latencies, 0.5),
        "health_p99_ms": milliseconds(health.latencies, 0.99),
        "health_failures": health.failures,
        "memory_before_mb": round(before / 1e6),
        "memory_peak_mb": round(memory.peak / 1e6),
        "memory_after_mb": round(after / 1e6),
        "memory_bound_mb": round((before + _bounds()) / 1e6),
    }
    return row | {"verdicts": _verdicts(row)}


def _bounds() -> float:
    """What the bounds of a server with default settings allow beyond what it has when idle."""
    settings, memory = Settings(), usable_memory()
    bodies = memory / 8 + settings.http.max_request_bytes
    media = memory / 8
    decoding = memory / 4 + settings.images.image_workers * _PAGE_BYTES
    cached = memory / 8 + settings.http.fetch_cache_gb * GIB + 2 * _PROCESSOR_CACHE_GB * GIB
    return bodies + media + decoding + cached + memory / _MEMORY_PER_CONNECTION * _CONNECTION_BYTES


def _verdicts(row: dict[str, Any]) -> dict[str, bool]:
    """Whether the row meets the targets that apply to it."""
    found = {
        "health": row["health_p99_ms"] <= _MOST_HEALTH_MS and not row["health_failures"],
        "memory": row["memory_peak_mb"] <= row["memory_bound_mb"],
    }
    if row["refused_p99_ms"] is not None and not _is_timed_out(row):
        found["refusals"] = row["refused_p99_ms"] <= _MOST_REFUSED_MS
    return found


def _is_timed_out(row: dict[str, Any]) -> bool:
    """Whether the clients were refused for their slowness, which takes time to tell."""
    return any(answer.startswith("408") for answer in row["answers"])


def _line(row: dict[str, Any]) -> str:
    verdicts = ", ".join(f"{k}: {'met' if v else 'NOT MET'}" for k, v in row["verdicts"].items())
    return (
        f"{row['what']}: {row['answers']}; refused after {row['refused_p50_ms']} / "
        f"{row['refused_p99_ms']} ms, /health {row['health_p99_ms']} ms, memory "
        f"{row['memory_peak_mb']} / {row['memory_after_mb']} MB; {verdicts}"
    )


def _parts(pictures: list[bytes], folder: Path) -> list[str]:
    """Write the body of a chat, cut where each picture ends: what is inserted there trails it."""
    urls = []
    for picture in pictures:
        padded = picture + bytes(-len(picture) % 3)
        urls.append(f"data:image/*;base64,{base64.b64encode(padded).decode()}!")
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in urls
    ]
    content.append({"type": "text", "text": "Describe the picture."})
    message = {"role": "user", "content": content}
    body = json.dumps({"messages": [message], "max_tokens": 8, "temperature": 0}).encode()
    files = []
    for number, part in enumerate(body.split(b"!")):
        files.append(folder / f"part-{number}")
        files[-1].write_bytes(part)
    return list(map(str, files))


def _generate(plan: Plan) -> list[Outcome]:
    printed = in_process("benchmarks.flood_load", plan)
    return [Outcome(**fields) for fields in json.loads(printed)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--only", type=lambda names: names.split(","), help=f"names of {', '.join(FLOODS)}")
    add("--model", default="server/demo")
    add("--engine-cores", help="cores for the model's threads (CPU only), such as 1")
    add("--flags", default="", help="more flags for the server, as one string")
    add("--settle-s", type=float, default=60.0, help="time before the memory is read again")
    return parser.parse_args()


if __name__ == "__main__":
    main()

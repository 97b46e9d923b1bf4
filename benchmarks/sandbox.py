"""What the sandbox of image workers costs: pictures in workers with and without it, in turn.

    python -m benchmarks.sandbox --output FILE [--rounds 20] [--starts 30]

Both workers run the model's real extractor, and each batch of a file is decoded and preprocessed by
one and then by the other. The costs are processor time of the worker's process, which other load on
the machine disturbs least: for a batch, and from the fork of a worker until it is ready. Each
figure is a median; the overhead is the median over the pairs.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import environment, photos
from server.settings import ImageSettings
from server.telemetry.record import Record
from server.workers.confinement import SandboxMode
from server.workers.forkserver import WorkerProcess
from server.workers.jobs import ProcessJob
from server.workers.pool import ImagePool
from server.workers.worker import WorkerSpec
from tests import hostile_pdfs, pictures

_MODES: tuple[SandboxMode, SandboxMode] = ("off", "require")
# Processor time of a batch, about, in seconds.
_BATCH_S = 0.4


def main() -> None:
    """Measure, print and save the costs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="server/demo")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of batches of each file")
    parser.add_argument("--starts", type=int, default=30, help="pairs of starts of a worker")
    options = parser.parse_args()
    rows = asyncio.run(_measured(options.model, options.rounds, options.starts))
    result = {"what": "sandbox", "model": options.model, **environment.describe(), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


async def _measured(model: str, rounds: int, starts: int) -> list[dict[str, Any]]:
    settings = ImageSettings(image_workers=1, pdf_page_timeout_s=30)
    without, within = (ImagePool(_spec(model, mode), settings) for mode in _MODES)
    rows = []
    async with without, within:
        for name, (job, data) in _files().items():
            count = max(1, round(_BATCH_S / await _batch(without, job, data, 1)))
            pairs = []
            for turn in range(rounds):
                order = (without, within) if turn % 2 else (within, without)
                found = {id(pool): await _batch(pool, job, data, count) for pool in order}
                pairs.append((found[id(without)] / count, found[id(within)] / count))
            rows.append(_row(name, pairs))
        pairs = [(_start_s(without), _start_s(within)) for _ in range(starts)]
        rows.append(_row("start of a worker", pairs))
    return rows


def _row(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    without, within = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    overhead = statistics.median(with_ / alone - 1 for alone, with_ in pairs)
    row = {
        "what": name,
        "without_ms": round(without, 3),
        "with_ms": round(within, 3),
        "overhead_percent": round(overhead * 100, 2),
        "pairs": len(pairs),
    }
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def _files() -> dict[str, tuple[ProcessJob, bytes]]:
    large, small = photos.photo(4000, 3000, 1), photos.photo(640, 480, 2)
    page = hostile_pdfs.page(content=b"q 0 0 1 rg 3 3 200 90 re f Q BT /F1 9 Tf (abc) Tj ET")
    picture = pictures.photo((1600, 1200), 3)
    return {
        "JPEG, 12 MP": (ProcessJob("JPEG", (4000, 3000)), large),
        "JPEG, 640x480": (ProcessJob("JPEG", (640, 480)), small),
        "PNG, 2 MP": (ProcessJob("PNG", picture.size), pictures.encode(picture, "PNG")),
        "WebP, 2 MP": (ProcessJob("WEBP", picture.size), pictures.encode(picture, "WEBP")),
        "PDF page, 1224x1584": (ProcessJob("PDF", (1224, 1584)), page),
    }


def _spec(model: str, mode: SandboxMode) -> WorkerSpec:
    from server.engine.vllm_adapter import plugin

    plugin.make_torchvision_importable()
    from vllm.engine.arg_utils import AsyncEngineArgs

    from server.engine.extractor import worker_spec

    config = AsyncEngineArgs(model=model, dtype="float32").create_model_config()
    return worker_spec(config, fast=True, max_pixels=100_000_000, sandbox=mode)


async def _batch(pool: ImagePool, job: ProcessJob, data: bytes, count: int) -> float:
    """Processor time of the worker for `count` pictures, in seconds."""
    (pid,) = pool.worker_pids
    before = _processor_s(pid)
    for number in range(count):
        await pool.process(f"{number}", data, job, Record())
    return _processor_s(pid) - before


def _start_s(pool: ImagePool) -> float:
    """Processor time of a worker from its fork until it is ready, in seconds."""
    process: WorkerProcess = pool.forkserver.start()
    try:
        process.connection.recv(1 << 16)
        return _processor_s(process.pid)
    finally:
        process.end()


def _processor_s(pid: int) -> float:
    """Processor time of a process, with its former threads."""
    return time.clock_gettime(
        ~pid << 3 | 2
    )  # the clock of another process: see clock_getcpuclockid


if __name__ == "__main__":
    main()

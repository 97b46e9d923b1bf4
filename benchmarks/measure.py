"""One measurement: one round of one workload against one of the two servers."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load import Answer, Plan, Result
from benchmarks.probes import GpuProbe, HealthProbe, MemoryProbe, ScrapeProbe
from benchmarks.processes import Cpu, Server, ServerFailed
from benchmarks.workloads import Batch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Measurement:
    """The numbers of one round; times in seconds, memory in bytes.

    "per image" means per request if a workload has no images. Shares refer to a single core,
    except those of the machine, which refer to all its cores.
    """

    requests: int
    images: int
    failures: int
    reconnects: int
    wall: float
    requests_per_second: float
    ttft_p50: float
    ttft_p95: float
    event_loop_cpu_per_request: float
    other_threads_cpu_per_request: float
    workers_cpu_per_request: float
    engine_cpu_per_request: float
    front_end_cpu_per_image: float
    total_cpu_per_image: float
    peak_memory: int
    health_p50: float
    health_p99: float
    health_failures: int
    scrape_p50: float | None
    gpu_share: float | None
    prompt_tokens: int
    completion_tokens: int
    generator_cpu_share: float
    idle_server_cpu_share: float
    machine_others_share: float
    machine_steal_share: float
    first_error: str


@dataclass(frozen=True, slots=True)
class _Clock:
    """One moment, as read from all clocks that a measurement uses."""

    wall: float
    server: Cpu
    idle: Cpu
    own: float  # this process and the load generators it has run
    busy: float  # the whole machine
    stolen: float


def measure(
    server: Server, idle: Server, batch: Batch, concurrency: int, timeout: float, limit: float
) -> tuple[Measurement, list[Answer]]:
    """Drive `server` with the batch, observe it meanwhile, and return the measurements."""
    plan = Plan(server.port, [str(body) for body in batch.bodies], concurrency, timeout)
    memory, health, gpu = MemoryProbe(server), HealthProbe(server), GpuProbe(server)
    scrapes = ScrapeProbe(server) if server.scraped else None
    _settle(idle)
    start = _read_clock(server, idle)
    with memory, health, gpu, scrapes or nullcontext():
        result = generate(plan, limit)
        _settle(server)
    end = _read_clock(server, idle)
    if all(answer.first_token is None for answer in result.answers):
        raise ServerFailed(f"{server.name} answered no request: {result.answers[0].error}")
    measured = _measurement(batch, result, start, end, memory, health, gpu, scrapes)
    return measured, result.answers


def generate(plan: Plan, limit: float) -> Result:
    """Run the load generator in a separate process, for at most `limit` seconds."""
    return Result.from_json(in_process("benchmarks.load", plan, limit))


def in_process(module: str, plan: "DataclassInstance", limit: float | None = None) -> str:
    """Run the load generator `module` in a separate process, for at most `limit` seconds; returns
    what it prints."""
    finished = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(dataclasses.asdict(plan)),
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        timeout=limit,
        check=True,
    )
    return finished.stdout


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def milliseconds(seconds: list[float], share: float) -> float | None:
    """Return the percentile in milliseconds, for a result file; None without values."""
    return round(1000 * percentile(seconds, share), 1) if seconds else None


def _measurement(
    batch: Batch,
    result: Result,
    start: _Clock,
    end: _Clock,
    memory: MemoryProbe,
    health: HealthProbe,
    gpu: GpuProbe,
    scrapes: ScrapeProbe | None,
) -> Measurement:
    good = [answer for answer in result.answers if not answer.error]
    errors = [answer.error for answer in result.answers if answer.error]
    first_tokens = [answer.first_token for answer in good if answer.first_token is not None]
    used, sent = end.server - start.server, len(batch.bodies)
    units = batch.images or sent
    idle = end.idle - start.idle
    span = end.wall - start.wall
    known = used.total + idle.total + end.own - start.own
    capacity = span * (os.cpu_count() or 1)
    return Measurement(
        requests=sent,
        images=batch.images,
        failures=len(errors),
        reconnects=sum(answer.reconnected for answer in result.answers),
        wall=result.wall,
        requests_per_second=len(good) / result.wall,
        ttft_p50=percentile(first_tokens, 0.50),
        ttft_p95=percentile(first_tokens, 0.95),
        event_loop_cpu_per_request=used.event_loop / sent,
        other_threads_cpu_per_request=used.other_threads / sent,
        workers_cpu_per_request=used.workers / sent,
        engine_cpu_per_request=used.engine / sent,
        front_end_cpu_per_image=used.front_end / units,
        total_cpu_per_image=used.total / units,
        peak_memory=memory.peak,
        health_p50=percentile(health.latencies, 0.50),
        health_p99=percentile(health.latencies, 0.99),
        health_failures=health.failures,
        scrape_p50=percentile(scrapes.latencies, 0.50) if scrapes else None,
        gpu_share=gpu.share,
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        completion_tokens=sum(answer.completion_tokens for answer in good),
        generator_cpu_share=result.cpu / result.wall,
        idle_server_cpu_share=idle.total / span,
        machine_others_share=max(0.0, end.busy - start.busy - known) / capacity,
        machine_steal_share=(end.stolen - start.stolen) / capacity,
        first_error=errors[0] if errors else "",
    )


def _settle(server: Server) -> None:
    """Wait until the server is idle, at most 5 s: its work after an answer is part of its cost.

    Without the wait, this work would also disturb the other server, whose turn is next.
    """
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        before = server.cpu().total
        time.sleep(0.5)
        if server.cpu().total - before <= 0.01:
            return


def _read_clock(server: Server, idle: Server) -> _Clock:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + children.ru_utime + children.ru_stime
    busy, stolen = machine_cpu()
    return _Clock(time.perf_counter(), server.cpu(), idle.cpu(), own, busy, stolen)


def machine_cpu() -> tuple[float, float]:
    """Return the CPU seconds used since boot, and those that the hypervisor took."""
    with open("/proc/stat") as file:
        ticks = [int(field) * _TICK for field in file.readline().split()[1:9]]
    user, nice, system, _idle, _wait, hard, soft, stolen = ticks
    return user + nice + system + hard + soft, stolen

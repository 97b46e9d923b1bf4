"""The main benchmark: this server against plain vLLM, on the same machine and model.

    python -m benchmarks.serve --stub-encoder --workloads text,12mp

Both servers run all the time. They are driven in turn, with the same requests, in several rounds
whose order alternates. README.md in this folder explains what is measured and how to read it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import environment, report
from benchmarks import options as command_line
from benchmarks.load import Plan
from benchmarks.measure import generate, measure
from benchmarks.processes import Server, ServerFailed, free_port
from benchmarks.trace_sink import trace_sink
from benchmarks.workloads import WORKLOADS, Batch, Bodies, Workload

_STUB_FOLDER = Path(__file__).resolve().parent / "stub_encoder"
_STUB_ADMISSION_FOLDER = _STUB_FOLDER.parent / "stub_admission"
_REQUEST_TIMEOUT = 120.0
_ROUND_LIMIT = 900.0
_DISTURBED = 0.1


def main() -> int:
    """Run the benchmark; return 1 if a request failed or the servers disagreed."""
    options = command_line.parse()
    signal.signal(signal.SIGTERM, _end)
    if options.baseline:
        revision = environment.commit(options.baseline)["revision"]
        print(f"This server at commit {revision} replaces plain vLLM.\n")
    for part in command_line.stubbed(options):
        print(f"Stubbed: {part}.")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        try:
            outcomes = _compare(options, Path(folder))
        except (ServerFailed, subprocess.SubprocessError) as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    print(f"results: {options.output}")
    return int(any(outcome.problems() for outcome in outcomes))


def _compare(options: argparse.Namespace, folder: Path) -> list[report.Outcome]:
    """Run all workloads; print and save the measurements after each."""
    outcomes: list[report.Outcome] = []
    description = environment.describe()
    with _servers(options, folder) as (ours, plain):
        bodies = Bodies(folder, _model_name(ours, plain))
        _try_out((ours, plain), bodies, options, folder)
        for workload in options.workloads:
            outcomes.append(_run(workload, ours, plain, bodies, options))
            print(report.table(outcomes[-1]), end="\n\n", flush=True)
            report.save(options.output, command_line.recorded(options), description, outcomes)
    return outcomes


@contextmanager
def _servers(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Server, Server]]:
    """Start both servers, and always end them."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if options.engine_cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = options.engine_cores
    if options.observed is not None:
        env["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
        env["OTEL_TRACES_SAMPLER_ARG"] = str(options.observed)
    if options.stub_encoder:
        env["STUB_ENCODER_REPORT"] = str(folder)
        env = _with_plugin(env, _STUB_FOLDER)
    ports = free_port(), free_port()
    ours_ready = "/health" if options.control else "/ready"
    if options.stub_engine:
        env["STUB_LAYERS"] = "1"
    with ExitStack() as stack:
        traces = stack.enter_context(trace_sink())
        ours_command, plain_command = command_line.commands(options, ports, traces)
        ours = Server(
            "ours",
            ours_command,
            ports[0],
            ours_ready,
            env,
            folder / "ours.log",
            scraped=options.observed is not None,
        )
        stack.callback(ours.stop)
        if environment.gpu() is not None:
            ours.wait_ready()  # vLLM measures how much of the memory is free while it starts
        plain = Server(
            "plain",
            plain_command,
            ports[1],
            "/health",
            _with_plugin(env, _STUB_ADMISSION_FOLDER) if options.unadmitted_baseline else env,
            folder / "plain.log",
            folder=options.baseline or command_line.ROOT,
        )
        stack.callback(plain.stop)
        for server in (ours, plain):
            server.wait_ready()
        yield ours, plain


def _with_plugin(env: dict[str, str], folder: Path) -> dict[str, str]:
    """`env` with the plugin in `folder`, which vLLM finds on the path."""
    before = env.get("PYTHONPATH")
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), before)))}


def _try_out(
    servers: tuple[Server, Server], bodies: Bodies, options: argparse.Namespace, folder: Path
) -> None:
    """Ask each server about one picture; make sure that the stub, if wanted, was used."""
    batch = bodies.round(WORKLOADS["small"], 1)
    for server in servers:
        _send(server, batch, options)
        used = any((folder / str(pid)).exists() for pid in server.engine_pids())
        if used != options.stub_encoder:
            raise ServerFailed(f"{server.name}: the stub of the vision encoder was used: {used}")


def _run(
    workload: Workload, ours: Server, plain: Server, bodies: Bodies, options: argparse.Namespace
) -> report.Outcome:
    """Warm both servers up, then measure them in turn.

    A round is disturbed if other processes used much of the machine. Spare rounds are run until
    there are enough undisturbed ones; the least disturbed are kept, whatever their outcome.
    """
    warm_up = bodies.warm_up(workload)
    for server in (ours, plain):
        _send(server, warm_up, options)
    warm_up.delete()
    rounds: list[report.Round] = []
    for number in range(options.rounds + options.spare_rounds):
        batch = bodies.round(workload, max(1, round(workload.requests * options.scale)))
        order = (ours, plain) if number % 2 == 0 else (plain, ours)
        rounds.append(_round(order, batch, options))
        batch.delete()
        if sum(each.disturbance < _DISTURBED for each in rounds) >= options.rounds:
            break
    calmest = sorted(rounds, key=lambda each: each.disturbance)[: options.rounds]
    return report.Outcome(workload, calmest, len(rounds) - len(calmest))


def _round(order: tuple[Server, Server], batch: Batch, options: argparse.Namespace) -> report.Round:
    """Measure one server after the other with the same requests."""
    seen = {}
    for server, idle in zip(order, reversed(order), strict=True):
        seen[server.name] = measure(
            server, idle, batch, options.concurrency, _REQUEST_TIMEOUT, _ROUND_LIMIT
        )
    return report.Round.of(order[0].name, seen["ours"], seen["plain"])


def _send(server: Server, batch: Batch, options: argparse.Namespace) -> None:
    """Send requests that are not measured; all of them must succeed."""
    paths = [str(body) for body in batch.bodies]
    result = generate(Plan(server.port, paths, options.concurrency, _REQUEST_TIMEOUT), _ROUND_LIMIT)
    for answer in result.answers:
        if answer.error:
            raise ServerFailed(f"{server.name} fails: {answer.error}")


def _model_name(ours: Server, plain: Server) -> str:
    """Return the model's name, which must be equal in both servers."""
    names = {json.loads(server.get("/v1/models")[1])["data"][0]["id"] for server in (ours, plain)}
    if len(names) != 1:
        raise ServerFailed(f"the servers have different names for the model: {sorted(names)}")
    return str(names.pop())


def _end(number: int, _frame: object) -> None:
    """Raise an exception, so that the servers are ended."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

"""Runs all measurements for a GPU, one after the other.

    python -m benchmarks.gpu                          # all parts
    python -m benchmarks.gpu --parts parity,pictures  # some of them
    python -m benchmarks.gpu --tiny                   # try the command, also without a GPU

Both servers share the GPU, and are driven in turn. Each part but `tests` writes the results of
`benchmarks.serve` for each of its runs. A part that fails does not keep the others from running.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environment
from benchmarks.gpu.model import qwen3_vl

_ROOT = Path(__file__).resolve().parents[2]
_DEMO = "server/demo"
_WORKERS = (1, 4, 8, 16)
_FRONT_ENDS = (1, 2, 4)
_SWEEP = "small,fullhd,12mp"


@dataclass(frozen=True)
class _Run:
    """One run of a module; `name` is that of its result."""

    name: str
    words: Sequence[str]


def main() -> int:
    """Run the parts; return 1 if one failed or was left out for want of time."""
    options = _parse()
    began, failed = time.monotonic(), []
    print(f"GPU: {environment.gpu('name,memory.total') or 'none'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        model = str(qwen3_vl(Path(folder) / "qwen3-vl-2b-shape", tiny=options.tiny))
        for run in _runs(options, model):
            left_s = 60 * options.minutes - (time.monotonic() - began)
            print(f"\n== {run.name}", flush=True)
            if left_s <= 0 or not _succeeds(run, left_s):
                failed.append(run.name)
    if failed:
        print(f"failed, or not run: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure this server against plain vLLM on a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", type=_parts, default=",".join(_PARTS), help="in this order")
    add("--minutes", type=float, default=120.0, help="runs that have not ended then are ended")
    add("--rounds", type=int, default=3, help="of each workload")
    add("--scale", type=float, default=4.0, help="factor on the number of requests in a round")
    add("--concurrency", type=int, default=64, help="requests in flight")
    add("--tiny", action="store_true", help="a tiny model and few requests, to try the command")
    add("--output", type=Path, help="folder; default: benchmarks/results/<date>-gpu")
    options = parser.parse_args()
    if options.output is None:
        name = f"{datetime.date.today().isoformat()}-gpu"
        options.output = _ROOT / "benchmarks" / "results" / name
    if options.tiny:
        options.rounds, options.scale, options.concurrency = 1, 0.1, 4
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(_PARTS):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}; there are: {', '.join(_PARTS)}"
        )
    return names


def _succeeds(run: _Run, seconds: float) -> bool:
    process = subprocess.Popen([sys.executable, "-m", *run.words], cwd=_ROOT)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its servers
        process.wait()
        return False


def _runs(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    for part in options.parts:
        yield from _PARTS[part](options, model)


# ---------------------------------------------------------------------- parts


def _parity(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    """The demo model, whose answers mean something, asked by one client: answers are equal."""
    words = ("--rounds", "1", "--spare-rounds", "0", "--concurrency", "1", "--scale", "0.2")
    workloads = "text,small,fullhd,documents"
    yield _serve(*(options, "parity", _DEMO, workloads, *words), our_flags="--image-decode exact")


def _tests(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    """The tests that compare features and answers bit for bit with vLLM's."""
    yield _Run("tests", ("pytest", "-q", "tests/server/test_parity.py"))


def _pictures(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    """Every workload, with the defaults of both servers."""
    yield _serve(options, "pictures", model, "text,small,fullhd,12mp,12mp_repeat,documents")


def _no_encoder(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    """The same with stubs of encoder and layers: what the front ends can feed."""
    workloads = "text,small,fullhd,12mp,12mp_repeat,documents"
    yield _serve(options, "front-end", model, workloads, "--stub-engine")


def _workers(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    for count in _few(options, _WORKERS):
        flags = f"--image-workers {count}"
        yield _serve(options, f"workers-{count}", model, _SWEEP, our_flags=flags)


def _front_ends(options: argparse.Namespace, model: str) -> Iterator[_Run]:
    for count in _few(options, _FRONT_ENDS):
        flags = f"--api-server-count {count}"
        yield _serve(
            *(options, f"front-ends-{count}", model, _SWEEP, "--stub-engine"), our_flags=flags
        )


def _few(options: argparse.Namespace, counts: Sequence[int]) -> Sequence[int]:
    """Those of `counts` that this machine has the cores for."""
    cores = os.cpu_count() or 1
    return counts[:1] if options.tiny else [count for count in counts if count <= cores]


_PARTS = {
    "parity": _parity,
    "pictures": _pictures,
    "front-end": _no_encoder,
    "workers": _workers,
    "front-ends": _front_ends,
    "tests": _tests,
}


def _serve(
    options: argparse.Namespace,
    name: str,
    model: str,
    workloads: str,
    *words: str,
    our_flags: str = "",
) -> _Run:
    """A run of `benchmarks.serve`; `words` come last, so they count."""
    flags = ""
    if model != _DEMO:
        flags += "--load-format dummy "
    if environment.gpu() is not None:  # two servers share it; graphs as in production
        flags += "--gpu-memory-utilization 0.4 --no-enforce-eager "
    given = {
        "--model": model,
        "--workloads": workloads,
        "--rounds": str(options.rounds),
        "--spare-rounds": "1",
        "--scale": str(options.scale),
        "--concurrency": str(options.concurrency),
        "--dtype": "bfloat16",
        "--max-model-len": "8192" if model == _DEMO or options.tiny else "32768",
        "--server-flags": flags.strip(),
        "--our-flags": our_flags.strip(),
        "--output": str(options.output / f"{name}.json"),
    }
    pairs = ["=".join(each) for each in given.items()]
    return _Run(name, ("benchmarks.serve", *pairs, *words))


if __name__ == "__main__":
    sys.exit(main())

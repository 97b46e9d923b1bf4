"""The command line of the benchmark, and the servers' command lines derived from it."""

import argparse
import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import commit
from benchmarks.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parent.parent
# Options that are in the name of the result file.
_MARKS = ("stub_encoder", "stub_engine", "control", "baseline", "observed", "unadmitted_baseline")


def parse() -> argparse.Namespace:
    """Return the options; `workloads` as a list of Workload, `output` as a path."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="Compare this server with plain vLLM, on the same machine and model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="server/demo", help="folder or name of the model, passed to both")
    add("--workloads", type=_workloads, default=",".join(WORKLOADS), help="names, in this order")
    add("--rounds", type=_positive, default=3, help="rounds per workload; odd ones start with ours")
    add(
        "--spare-rounds",
        type=int,
        default=3,
        help="most extra rounds to replace disturbed ones",
    )
    add("--concurrency", type=_positive, default=8, help="requests in flight")
    add("--scale", type=float, default=1.0, help="factor on the number of requests in a round")
    add("--stub-encoder", action="store_true", help="use the same stub vision encoder in both")
    add(
        "--stub-engine",
        action="store_true",
        help="also stub the language model's layers in both; scheduler, sampler and IPC are real",
    )
    add("--image-decode", choices=("exact", "fast"), help="passed to our server only")
    add("--mm-processor-kwargs", type=json.loads, help="JSON, passed to both")
    add("--max-model-len", type=_positive, default=8192, help="passed to both")
    add("--dtype", default="float32", help="passed to both")
    add("--server-flags", default="", help="more flags, as one string, passed to both")
    add("--our-flags", default="", help="more flags, as one string, passed to our server only")
    add(
        "--engine-cores",
        help="cores for the model's threads of both (CPU only), such as 1 or 2-3",
    )
    add("--control", action="store_true", help="plain vLLM on both sides: all ratios should be 1")
    add(
        "--baseline",
        type=Path,
        help="folder of another checkout of this server, to compare with instead of plain vLLM",
    )
    add(
        "--observed",
        type=float,
        metavar="SHARE",
        help="our server logs requests as JSON, traces this share, and is scraped every 5 s",
    )
    add(
        "--unadmitted-baseline",
        action="store_true",
        help="in the baseline, no request needs a permit",
    )
    add("--output", type=Path, help="result file; default: benchmarks/results/<date>-<name>")
    options = parser.parse_args()
    if options.unadmitted_baseline and not options.baseline:
        parser.error("--unadmitted-baseline needs a --baseline")
    options.stub_encoder |= options.stub_engine
    options.output = options.output or _default_output(options)
    return options


def commands(
    options: argparse.Namespace, ports: tuple[int, int], traces: str = "ENDPOINT"
) -> tuple[list[str], list[str]]:
    """Return the command lines of our server and of plain vLLM. If observed, our server sends its
    traces to `traces`."""
    flags = _common_flags(options)
    plain = ["-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    saccade = ["-m", "server", "serve", options.model]
    ours = plain if options.control else saccade
    if options.baseline:
        plain = saccade
    own = ["--image-decode", options.image_decode] if options.image_decode else []
    own += shlex.split(options.our_flags)
    if options.observed is not None:
        own += ["--log-format", "json", "--otlp-traces-endpoint", traces]
    return (
        [sys.executable, *ours, "--port", str(ports[0]), *flags, *own],
        [sys.executable, *plain, "--port", str(ports[1]), *flags],
    )


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options for the result file."""
    ours, plain = commands(options, (0, 0))
    return {
        **vars(options),
        "output": options.output.name,
        "baseline": commit(options.baseline) if options.baseline else None,
        "workloads": [workload.name for workload in options.workloads],
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("VLLM_", "OMP_", "KMP_", "SACCADE_"))
        },
        "stubbed": stubbed(options),
        "commands": {
            "ours": shlex.join(["python", *ours[1:]]),
            "plain": shlex.join(["python", *plain[1:]]),
        },
    }


def stubbed(options: argparse.Namespace) -> list[str]:
    """Return what is not real, in words."""
    parts = {"vision encoder": options.stub_encoder, "language model's layers": options.stub_engine}
    return [f"{part}, in both servers" for part, is_stub in parts.items() if is_stub]


def _common_flags(options: argparse.Namespace) -> list[str]:
    flags = ["--enforce-eager", "--disable-uvicorn-access-log", "--dtype", options.dtype]
    flags += ["--max-model-len", str(options.max_model_len)]
    flags += ["--max-num-seqs", str(max(16, options.concurrency))]
    flags += ["--mm-processor-cache-gb", "1"]
    if options.mm_processor_kwargs is not None:
        flags += ["--mm-processor-kwargs", json.dumps(options.mm_processor_kwargs)]
    return flags + shlex.split(options.server_flags)


def _default_output(options: argparse.Namespace) -> Path:
    name = Path(options.model).name
    marks = [mark for mark in _MARKS if getattr(options, mark)]
    if options.image_decode:
        marks.append(options.image_decode)
    stem = "-".join([datetime.date.today().isoformat(), name, *marks]).replace("_", "-")
    return ROOT / "benchmarks" / "results" / f"{stem}.json"


def _workloads(names: str) -> list[Workload]:
    unknown = set(names.split(",")) - set(WORKLOADS)
    if unknown:
        known = ", ".join(WORKLOADS)
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; there are: {known}")
    return [WORKLOADS[name] for name in names.split(",")]


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number

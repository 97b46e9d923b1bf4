"""The start of a server: elapsed and CPU time from `exec` to the first answer about a picture.

    python -m benchmarks.startup [--baseline FOLDER] [--rounds 3] [--output FILE]

Starts this server, plain vLLM and, if given, the server of another checkout in turn, in several
rounds, with the same flags. Prints the median of the rounds for each kind of process. CPU time
grows by up to a half if other programs use the machine; `busy` is the share of the machine that
they used.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import environment
from benchmarks.measure import machine_cpu
from benchmarks.processes import Server, free_port, proportional

ROOT = Path(__file__).resolve().parent.parent
_MODEL = "server/demo"
_FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "8192")
_INTERVAL_S = 0.05
_TIMEOUT_S = 120


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, help="folder of another checkout of this server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="result file")
    options = parser.parse_args()
    description = {
        **environment.describe(),
        "baseline": environment.commit(options.baseline) if options.baseline else None,
    }
    starts: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for name, command, folder in _commands(options.baseline):
            starts.append({"round": number, "server": name, **_start(name, command, folder)})
            print(json.dumps(starts[-1]), flush=True)
            if options.output:
                result = {**description, "starts": starts}
                options.output.write_text(json.dumps(result, indent=1) + "\n")
    _show(starts)


def _commands(baseline: Path | None) -> Iterator[tuple[str, list[str], Path]]:
    """The name, the arguments of Python and the folder of each server."""
    saccade = ["-m", "server", "serve", _MODEL]
    yield "ours", saccade, ROOT
    if baseline is not None:
        yield "baseline", saccade, baseline.resolve()
    yield "plain", ["-m", "vllm.entrypoints.openai.api_server", "--model", _MODEL], ROOT


def _start(name: str, command: list[str], folder: Path) -> dict[str, Any]:
    """Start a server, ask it about a picture, and stop it."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as logs:
        port = free_port()
        started, (busy, _) = time.monotonic(), machine_cpu()
        server = Server(
            name,
            [sys.executable, *command, "--port", str(port), *_FLAGS],
            port,
            "/health",
            {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
            Path(logs) / "log",
            folder=folder,
        )
        try:
            server.wait_ready(_INTERVAL_S)
            ready_s = time.monotonic() - started
            _ask(port)
            answered_s = time.monotonic() - started
            cpu, memory = server.cpu_by_role(), proportional(server.pids())
            others = machine_cpu()[0] - busy - sum(cpu.values())
        finally:
            server.stop()
    return {
        "ready_s": round(ready_s, 2),
        "answered_s": round(answered_s, 2),
        "cpu_s": {role: round(seconds, 2) for role, seconds in sorted(cpu.items())},
        "memory_mib": memory >> 20,
        "busy": round(max(0.0, others) / answered_s / (os.cpu_count() or 1), 2),
    }


def _ask(port: int) -> None:
    """Ask about a picture; raise `OSError` or `HTTPException` if there is no answer."""
    file = io.BytesIO()
    Image.new("RGB", (224, 224), "red").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What color is it?"},
    ]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(response.read())


def _show(starts: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(start["server"] for start in starts):
        mine = [start for start in starts if start["server"] == name]
        roles = sorted({role for start in mine for role in start["cpu_s"]})
        cpu = {
            role: statistics.median(start["cpu_s"].get(role, 0.0) for start in mine)
            for role in roles
        }
        total = statistics.median(sum(start["cpu_s"].values()) for start in mine)
        medians = {
            key: statistics.median(start[key] for start in mine)
            for key in ("answered_s", "memory_mib", "busy")
        }
        print(
            f"{name:9} first answer after {medians['answered_s']:.1f} s, {total:.1f} s of CPU ("
            + ", ".join(f"{role} {seconds:.1f}" for role, seconds in cpu.items())
            + f"), {medians['memory_mib']:.0f} MiB, busy {medians['busy']:.2f}"
        )


if __name__ == "__main__":
    main()

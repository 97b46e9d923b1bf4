"""Text requests beside 4K videos: how much later their first token comes, and the videos' memory.

    python -m benchmarks.video_beside --output FILE

Text requests arrive at random times, alone and while each of some clients sends one new 4K clip of
30 s after the other. Their answers have one token, so that the time of an answer is that of its
first token. At last, a 4K clip of ten minutes is decoded. The memory is the private one of the
processes that decode: what they do not share with the process they are forks of.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks import environment, videos
from benchmarks.chats import MODEL_NAME
from benchmarks.measure import in_process, milliseconds
from benchmarks.open_load import Outcome, Plan, Source
from benchmarks.processes import Server, free_port, private

_TIMEOUT_S = 120.0
_POLL_S = 0.05
_MIB = 1 << 20
_STUB = str(Path(__file__).resolve().parent / "stub_encoder")


class Bench:
    """One server, and the folder from which it may read clips."""

    def __init__(self, server: Server, folder: Path, options: argparse.Namespace) -> None:
        self._server = server
        self._folder = folder
        self._options = options
        self._number = 0
        self.peak = 0

    def measured(self, clip: bytes | None) -> dict[str, Any]:
        """The times of text requests, beside clips if there is one."""
        options = self._options
        texts = self._bodies(round(options.rate * options.seconds * 2) + 10, None)
        sources = [Source("text", "none", texts, options.seconds, options.rate)]
        if clip is not None:
            clips = self._bodies(options.clips, clip)
            sources.append(Source("clips", "none", clips, options.seconds, clients=options.clients))
        printed = in_process("benchmarks.open_load", Plan(self._server.port, sources, 120.0))
        outcomes = [Outcome(**fields) for fields in json.loads(printed)]
        answered = [each.total_s for each in outcomes if each.source == "text" and each.complete]
        return {
            "texts": len(answered),
            "failures": sum(not each.complete for each in outcomes),
            "clips": sum(each.source == "clips" and each.complete for each in outcomes),
            "ttft_p50_ms": milliseconds(answered, 0.5),
            "ttft_p95_ms": milliseconds(answered, 0.95),
        }

    def memory(self, clip: bytes) -> dict[str, Any]:
        """The memory of the process that decodes one clip. To look at it takes processor time, so
        nothing else is measured meanwhile."""
        self.peak = 0
        (body,) = self._bodies(1, clip)
        with self._watched():
            answer = httpx.post(
                f"http://127.0.0.1:{self._server.port}/v1/chat/completions",
                content=Path(body).read_bytes(),
                headers={"Content-Type": "application/json"},
                timeout=_TIMEOUT_S,
            )
        answer.raise_for_status()
        return {"bytes": len(clip), "private_mib": round(self.peak / _MIB)}

    def _bodies(self, count: int, clip: bytes | None) -> list[str]:
        """The files of new requests."""
        found = []
        for _ in range(count):
            self._number += 1
            parts: list[dict[str, Any]] = [{"type": "text", "text": f"Question {self._number}?"}]
            if clip is not None:
                path = self._folder / f"{self._number}.mp4"
                path.write_bytes(videos.stamp(clip, f"clip {self._number}"))
                parts.insert(0, {"type": "video_url", "video_url": {"url": path.as_uri()}})
                parts[0]["video_url"]["num_frames"] = 8
            body = {"model": MODEL_NAME, "max_tokens": 1, "stream": True}
            found.append(str(self._folder / f"{self._number}.json"))
            message = {"role": "user", "content": parts}
            Path(found[-1]).write_text(json.dumps({**body, "messages": [message]}))
        return found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_POLL_S):
                for pid in self._server.titled("VideoDecoder"):
                    self.peak = max(self.peak, private([pid]))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def main() -> None:
    """Measure a server, and save what was measured."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    clip = videos.large(quality=23, seconds=30)
    long = videos.large(quality=45, seconds=600)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as stack:
        server = _start(Path(folder), options)
        stack.callback(server.stop)
        server.wait_ready()
        bench = Bench(server, Path(folder), options)
        bench.measured(None)  # warms up
        rounds = []
        for _ in range(options.rounds):
            rounds.append({"alone": bench.measured(None), "beside": bench.measured(clip)})
            print(json.dumps(rounds[-1]), flush=True)
        result = {
            "what": "text requests beside 4K videos",
            "stubbed": ["vision encoder"] if options.stub_encoder else [],
            "options": {key: value for key, value in vars(options).items() if key != "output"},
            **environment.describe(),
            "rounds": rounds,
            "half_a_minute": bench.memory(clip),
            "ten_minutes": bench.memory(long),
            "summary": _summary(rounds),
        }
    print(json.dumps({key: result[key] for key in ("summary", "ten_minutes")}))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the ratios of the rounds."""
    return {
        name: round(
            statistics.median(each["beside"][name] / each["alone"][name] for each in rounds), 2
        )
        for name in ("ttft_p50_ms", "ttft_p95_ms")
    }


def _start(folder: Path, options: argparse.Namespace) -> Server:
    port = free_port()
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if options.engine_cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = options.engine_cores
    if options.stub_encoder:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (_STUB, env.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "server", "serve", "server/demo", *options.flags.split()]
    flags = ["--port", str(port), "--max-model-len", "4096", "--disable-uvicorn-access-log"]
    flags += ["--allowed-local-media-path", str(folder), "--served-model-name", MODEL_NAME]
    return Server("ours", [*command, *flags], port, "/ready", env, folder / "ours.log")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--flags", default="", help="more flags for the server, as one string")
    add("--stub-encoder", action="store_true", help="use a stub of the vision encoder")
    add("--engine-cores", default="1", help="cores for the model's threads")
    add("--rate", type=float, default=4.0, help="text requests per second")
    add("--seconds", type=float, default=12.0, help="duration of each measurement")
    add("--clients", type=int, default=1, help="clips that are sent at a time")
    add("--clips", type=int, default=40, help="most clips of a measurement")
    add("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""The cost of a scrape of /metrics: CPU time of the server, and how long Prometheus waits.

    python -m benchmarks.scrape [--output FILE]

The embedded model answers questions about pictures first, so that every series exists. The CPU
time is measured on an idle server with many scrapes, because it cannot be separated under load. The
duration of a scrape is measured idle, and while clients send requests as fast as they can.
"""

import argparse
import base64
import concurrent.futures
import io
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks import environment
from benchmarks.processes import Server

_CLIENTS = 4
_PICTURES = 12  # pictures in requests before the measurement
# Scrapes within a second of each other would share a page.
_FRESH = {"Cache-Control": "no-cache"}
_IDLE_SCRAPES, _LOADED_SCRAPES = 300, 60
_INTERVAL_S = 0.5  # of scrapes under load
_TIMEOUT_S = 120
_PATH = "/v1/chat/completions"


def _body(seed: int) -> dict[str, object]:
    """A question about a picture that is unique to the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (224, 224, 3), np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG")
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in the image?"},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": "saccade-tiny", "messages": messages, "max_tokens": 16, "ignore_eos": True}


def _ask(client: httpx.Client, seed: int) -> None:
    client.post(_PATH, json=_body(seed)).raise_for_status()


def _scrape(client: httpx.Client) -> float:
    """The duration in milliseconds."""
    started = time.perf_counter()
    client.get("/metrics", headers=_FRESH).raise_for_status()
    return (time.perf_counter() - started) * 1e3


def _idle(server: Server, client: httpx.Client) -> dict[str, float]:
    before = server.cpu().front_end
    taken = [_scrape(client) for _ in range(_IDLE_SCRAPES)]
    spent = server.cpu().front_end - before
    return {"cpu_ms": round(spent / _IDLE_SCRAPES * 1e3, 2), **_percentiles(taken)}


def _loaded(url: str, client: httpx.Client) -> dict[str, float]:
    ended = threading.Event()

    def load(number: int) -> int:
        asked = 0
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as own:
            while not ended.is_set():
                _ask(own, 1000 * (number + 1) + asked)
                asked += 1
        return asked

    taken = []
    with concurrent.futures.ThreadPoolExecutor(_CLIENTS) as threads:
        started = time.monotonic()
        loads = [threads.submit(load, number) for number in range(_CLIENTS)]
        try:
            for _ in range(_LOADED_SCRAPES):
                time.sleep(_INTERVAL_S)
                taken.append(_scrape(client))
        finally:
            ended.set()
        answered = sum(each.result() for each in loads)
        rate = answered / (time.monotonic() - started)
    return {"requests_per_second": round(rate, 1), **_percentiles(taken)}


def _percentiles(taken: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(taken, n=100)
    return {"p50_ms": round(cuts[49], 2), "p90_ms": round(cuts[89], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--port", str(port)]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    log = Path(tempfile.mkdtemp()) / "server.log"
    server = Server("ours", [*command, "--mm-processor-cache-gb", "1"], port, "/ready", env, log)
    url = f"http://127.0.0.1:{port}"
    try:
        server.wait_ready()
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as client:
            for seed in range(_PICTURES):
                _ask(client, seed)
            found = {
                "samples": sum(
                    not line.startswith("#")
                    for line in client.get("/metrics", headers=_FRESH).text.splitlines()
                ),
                "idle": _idle(server, client),
                "loaded": _loaded(url, client),
            }
    finally:
        server.stop()
    print(json.dumps(found, indent=1))
    if output is not None:
        result = {"what": "cost of a scrape", **environment.describe(), **found}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

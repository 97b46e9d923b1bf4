"""Two servers with the demo model behind haproxy, for `benchmarks.fleet`."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fleet_load import SERVED_BY
from benchmarks.processes import Server, free_port
from tests.services import program, running

_CONFIGURATION = Path(__file__).resolve().parent.parent / "deploy" / "haproxy" / "haproxy.cfg"
_CACHE_GIB = 0.004
_ADMIN_KEY = "benchmark"


def server(name: str, port: int, folder: Path) -> Server:
    flags = ["--host", "127.0.0.1", "--port", str(port), "--no-files", "--admin-key", _ADMIN_KEY]
    flags += ["--max-model-len", "2048", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
    flags += ["--mm-processor-cache-gb", "1", "--embedding-cache-gb", str(_CACHE_GIB)]
    flags += ["--image-workers", "1"]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env |= {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75"}
    command = [sys.executable, "-m", "server", "serve", *flags]
    return Server(name, command, port, "/ready", {**os.environ, **env}, folder / f"{name}.log")


def stopped(servers: Sequence[Server]) -> None:
    for server in servers:
        server.stop()


def _configuration(round_robin: bool) -> str:
    """That of `deploy/haproxy`, without TLS, and with the server's name in each answer."""
    text = _CONFIGURATION.read_text()
    changes = {
        'bind "${LISTEN}" ssl crt "${CERTIFICATE}"': 'bind "${LISTEN}"',
        "    default_backend saccade\n": "    default_backend saccade\n"
        f"    http-response set-header {SERVED_BY} %s\n",
    }
    if round_robin:
        changes["    balance hdr(X-Session-ID)\n"] = "    balance roundrobin\n"
        changes["    hash-type consistent sdbm avalanche\n    hash-balance-factor 150\n"] = ""
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"deploy/haproxy/haproxy.cfg has no {old!r}")
        text = text.replace(old, new)
    return text


@contextmanager
def haproxy(servers: Sequence[Server], folder: Path, *, round_robin: bool) -> Iterator[str]:
    """The URL of haproxy in front of the servers."""
    port = free_port()
    path = folder / f"haproxy-{port}.cfg"
    path.write_text(_configuration(round_robin))
    url = f"http://127.0.0.1:{port}"
    env = os.environ | {"LISTEN": f"127.0.0.1:{port}", "METRICS": f"127.0.0.1:{free_port()}"}
    env["INNER"] = f"unix@{folder}/inner-{port}"
    for number, server in enumerate(servers, 1):
        env[f"BACKEND_{number}"] = f"127.0.0.1:{server.port}"

    def ready() -> bool:
        return httpx.get(f"{url}/v1/models").status_code == httpx.codes.OK

    command: list[str | Path] = [program("haproxy"), "-db", "-f", path]
    with running(command, ready=ready, env=env, log=folder / "haproxy.log"):
        yield url


def cleared(servers: Sequence[Server]) -> None:
    for server in servers:
        url = f"http://127.0.0.1:{server.port}/v1/cache"
        headers = {"Authorization": f"Bearer {_ADMIN_KEY}"}
        httpx.delete(url, headers=headers, timeout=30).raise_for_status()


def entries(server: Server) -> Any:
    """What the host tier of the embedding cache holds."""
    _, body = server.get("/v1/cache", key=_ADMIN_KEY)
    return json.loads(body)

"""Memory after a flood of large pictures: given back while the server is idle."""

import concurrent.futures
import time

import httpx
import psutil

from tests import pictures
from tests.conftest import Server
from tests.pictures import image_part, user

SIZE = (4000, 3000)
# What the server and its image workers may keep more than before. The engine keeps features, up to
# the size of its cache.
KEPT_BYTES = 40 << 20
WAIT_S = 60


def private(server: Server) -> int:
    """Resident memory of the server and its image workers that no file is behind, in bytes."""
    processes = [psutil.Process(server.process.pid), *server.image_workers()]
    return sum(process.memory_info().rss - process.memory_info().shared for process in processes)


def flood(http: httpx.Client, files: list[bytes]) -> None:
    def ask(file: bytes) -> int:
        body = {"model": "saccade-tiny", "messages": user(image_part(file)), "max_tokens": 1}
        return http.post("/v1/chat/completions", json=body, timeout=300).status_code

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert set(threads.map(ask, files)) == {200}


def test_memory_is_given_back_after_a_flood(server: Server, http: httpx.Client) -> None:
    files = [pictures.encode(pictures.photo(SIZE, seed), "JPEG") for seed in range(2)]
    # Trailing bytes make other files of the same pictures.
    flood(http, files)
    time.sleep(2)
    before = private(server)
    flood(http, [file + bytes([turn]) for turn in range(16) for file in files])
    deadline = time.monotonic() + WAIT_S
    while (now := private(server)) > before + KEPT_BYTES:
        assert time.monotonic() < deadline, f"{before >> 20} MiB before, {now >> 20} MiB after"
        time.sleep(1)

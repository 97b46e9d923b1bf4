"""Rolling restarts behind nginx and haproxy, under load: no request fails.

The servers are the server's HTTP side without an engine, which allows far more load.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from server.settings import HttpSettings
from tests.proxies import BOTH, Proxy, free_port, proxy
from tests.restarts import CHAT, start

# nginx does not use a server for so long after it was refused (deploy/nginx/saccade/backends.conf).
NGINX_PAUSE_S = 10
DELAY_S = HttpSettings().drain_delay_s
PATIENCE_S = 120


class Load:
    """Clients that send requests through a proxy, one after the other, whole and streamed."""

    def __init__(self, behind: Proxy, clients: int, body: dict[str, Any]) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._proxy = behind
        self._body = body
        self._stops = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self) -> None:
        """Wait until more requests were answered."""
        wanted = self.answered + 20
        until(lambda: self.answered >= wanted or bool(self.failures))

    def _run(self) -> None:
        with self._proxy.client() as client:
            for stream in itertools.cycle((True, False)):
                if self._stops.is_set():
                    return
                try:
                    answer = client.post(CHAT, json={**self._body, "stream": stream})
                except httpx.TransportError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code != 200 or (stream and "data: [DONE]" not in answer.text):
                    self.failures.append(f"{answer.status_code} {answer.text[-300:]}")
                self.answered += 1


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def all_used(behind: Sequence[Proxy]) -> bool:
    """Whether haproxy uses both servers."""
    texts = [httpx.get(one.metrics_url).text for one in behind if one.metrics_url]
    sample = 'haproxy_server_status{{proxy="saccade",server="{}",state="UP"}} 1'
    return all(sample.format(name) in text for text in texts for name in ("one", "two"))


def proxies(stack: ExitStack, folder: Path, ports: Sequence[int]) -> list[Proxy]:
    """Both proxies in front of servers on `ports`, which they use."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    behind = []
    for kind in BOTH:
        (folder / kind).mkdir()
        behind.append(stack.enter_context(proxy(kind, folder / kind, addresses)))
    until(lambda: all_used(behind))
    return behind


def test_no_request_fails_while_servers_restart(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    running = [start(port, delay_s=DELAY_S) for port in ports]
    with ExitStack() as stack:
        behind = proxies(stack, tmp_path, ports)
        loads = [stack.enter_context(Load(one, 8, {"seconds": 0.03})) for one in behind]
        statuses = Counter[int]()
        for number, port in enumerate(ports):
            for load in loads:
                load.goes_on()
            running[number].signal()
            statuses[running[number].wait()] += 1
            for load in loads:
                load.goes_on()  # by the other server
            running[number] = start(port, delay_s=DELAY_S)
            until(lambda number=number: is_ready(running[number].url))
            time.sleep(NGINX_PAUSE_S)
            until(lambda: all_used(behind))
    assert statuses == {0: 2}
    for load in loads:
        assert load.failures == []

"""The end of the HTTP server: signals, exit statuses, and connections that are open."""

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.http.drain import close_port
from server.http.protocol import ServerState
from tests.proxies import free_port
from tests.restarts import CHAT, Running, start

REQUESTS_CUT = 3
LONG_S = 600.0
PATIENCE_S = 30.0


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def asking(server: Running, *, stream: bool, seconds: float) -> Iterator[list[httpx.Response]]:
    """A request that the server has when the block begins; its answer is there when it ends."""
    answers: list[httpx.Response] = []
    before = server.begun()

    def ask() -> None:
        body = {"stream": stream, "seconds": seconds}
        answers.append(httpx.post(server.url + CHAT, json=body, timeout=PATIENCE_S))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        until(lambda: server.begun() > before)
        yield answers
    finally:
        thread.join()


def test_requests_are_served_until_balancers_have_noticed() -> None:
    server = start(free_port(), delay_s=LONG_S)
    body = {"stream": False, "seconds": 0.0}
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        before = client.post(CHAT, json=body)
        assert "connection" not in before.headers
        with asking(server, stream=False, seconds=2.0) as answers:
            server.signal()
            until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            for answer in (client.post(CHAT, json=body), client.post(CHAT, json=body)):
                assert answer.status_code == 200
                assert answer.headers["connection"] == "close"
    assert answers[0].status_code == 200
    assert answers[0].headers["connection"] == "close"
    server.signal()  # ends the delay
    assert server.wait() == 0
    assert not listens(server.port)


def test_the_port_closes_after_the_delay() -> None:
    server = start(free_port(), delay_s=0.5)
    server.signal()
    assert server.wait() == 0


def test_ctrl_c_does_not_wait_for_balancers() -> None:
    server = start(free_port(), delay_s=LONG_S)
    with asking(server, stream=True, seconds=1.0) as answers:
        server.signal(signal.SIGINT)
    assert "data: [DONE]" in answers[0].text
    assert "error" not in answers[0].text
    assert server.wait() == 0


@pytest.mark.parametrize("again", [False, True])
def test_requests_that_are_cut_off_get_an_error_and_the_exit_status_says_so(again: bool) -> None:
    """They are cut off at the time-out of the drain, or by a second signal."""
    server = start(free_port(), timeout_s=int(LONG_S) if again else 1)
    with (
        asking(server, stream=True, seconds=LONG_S) as streamed,
        asking(server, stream=False, seconds=LONG_S) as whole,
    ):
        server.signal()
        if again:
            until(lambda: not listens(server.port))
            server.signal()
    assert server.wait() == REQUESTS_CUT
    assert whole[0].status_code == 503
    assert whole[0].headers["Retry-After"]
    lines = streamed[0].text.splitlines()
    (event,) = [line for line in lines if line.startswith('data: {"error"')]
    assert "data: [DONE]" in lines
    for error in (whole[0].json(), json.loads(event.removeprefix("data: "))):
        assert error["error"]["code"] == "server_busy"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_do_not_kill_a_server_that_ends(number: int) -> None:
    server = start(free_port(), delay_s=LONG_S)
    while server.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            server.signal(number)
        time.sleep(0.0005)
    assert server.wait() == 0


def test_a_request_whose_headers_are_incomplete_is_answered() -> None:
    server = start(free_port())
    body = json.dumps({"stream": False, "seconds": 0.0}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n".encode()
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as begun,
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as idle,
    ):
        begun.sendall(head)
        idle.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        received = idle.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 200 ")
        server.signal()
        while received:  # up to the end of the connection
            received = idle.recv(1 << 16)
        begun.sendall(b"\r\n" + body)
        assert begun.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert server.wait() == 0


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
            return True
    except ConnectionRefusedError:
        return False


def test_connections_in_the_kernels_queue_are_not_reset_when_the_port_closes() -> None:
    """A connection that the server has not accepted yet, because it is busy."""

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        address: Any = listener.getsockname()
        with socket.create_connection(address, timeout=PATIENCE_S) as client:
            client.sendall(b"request")
            closing = asyncio.create_task(close_port([], [listener], ServerState()))
            await asyncio.sleep(0.5)
            assert not closing.done()
            with socket.socket() as late:  # neither established nor refused: it will try again
                late.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    late.connect(address)
            accepted, _ = listener.accept()
            await closing
            with accepted:
                assert accepted.recv(100) == b"request"
                accepted.sendall(b"answer")
            assert client.recv(100) == b"answer"
        assert not listens(address[1])

    asyncio.run(run())

"""Limits on connections that apply before the API key: headers, URLs, slow and silent clients."""

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import pytest

from server.settings import ConnectionSettings, Settings
from tests.http_server import answer_ok, serving

CONNECTIONS = 40
HEADER_TIMEOUT_S = 1.5
SETTINGS = Settings(
    connections=ConnectionSettings(
        max_connections=CONNECTIONS, header_timeout_s=HEADER_TIMEOUT_S, send_timeout_s=2.0
    )
)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
# What a client of these tests may have to wait, on a busy machine.
PATIENCE_S = 30.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in reversed(range(1000)):  # 64 MB
            body = {"body": bytes(1 << 16), "more_body": number > 0}
            await send({"type": "http.response.body", **body})
        return
    await answer_ok(scope, receive, send)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(app, SETTINGS, shutdown_timeout=1) as port:
        yield port


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    received = b""
    while piece := client.recv(1 << 16):
        received += piece
    return received


def refused(received: bytes) -> tuple[int, str]:
    """Status and code of the only answer in `received`, which is an error in OpenAI's shape."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


def send_until_refused(port: int, first: bytes, piece: bytes, nbytes: int) -> tuple[int, str]:
    """Send `first` and then `piece` again and again; fails if the server takes `nbytes`."""
    with connected(port) as client:
        client.sendall(first)
        client.settimeout(0.0)
        sent = 0
        deadline = time.monotonic() + PATIENCE_S
        while sent < nbytes and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                sent += client.send(piece)
            try:
                client.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                continue
            client.settimeout(PATIENCE_S)
            return refused(read_all(client))
    raise AssertionError(f"the server took {sent} bytes")


@pytest.mark.parametrize(
    ("first", "piece", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\n", b"X: " + b"x" * 1000 + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nX: ", b"x" * 1000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n", b"x" * 1000, 431, "headers_too_large"),
        (b"GET /", b"x" * 1000, 414, "url_too_long"),
        (b"GET /?", b"x" * 1000, 414, "url_too_long"),
    ],
)
def test_an_endless_head_is_refused(
    port: int, first: bytes, piece: bytes, status: int, code: str
) -> None:
    assert send_until_refused(port, first, piece, 30_000_000) == (status, code)


def test_a_client_that_sends_all_before_it_reads_gets_its_refusal(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET /" + b"u" * (20 << 20) + b" HTTP/1.1\r\n\r\n")
        assert client.recv(1024).startswith(b"HTTP/1.1 414 ")


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "piece", "status"),
    [
        (CHUNKED + b"1;a=", b"x" * 1000, 400),
        (CHUNKED, b"1\r\nx\r\n", 400),
        (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n", 400),
        (CHUNKED + b"1\r\nx\r\n0\r\nX: ", b"y" * 1000, 400),
    ],
)
def test_endless_framing_of_a_body_is_refused(
    port: int, first: bytes, piece: bytes, status: int
) -> None:
    assert send_until_refused(port, first, piece, 30_000_000)[0] == status


def test_trailers_do_not_become_headers(port: int) -> None:
    seen: list[Any] = []

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        await answer_ok(scope, receive, send)
        seen.extend(scope["headers"])

    with serving(noting, SETTINGS) as other, connected(other) as client:
        trailers = b"1\r\nx\r\n0\r\nAuthorization: Bearer k\r\n\r\n"
        client.sendall(CHUNKED.replace(b"Host", b"Connection: close\r\nHost") + trailers)
        assert read_all(client).startswith(b"HTTP/1.1 200")
    assert [name for name, _ in seen] == [b"connection", b"host", b"transfer-encoding"]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n  folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
        b"GARBAGE\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    ],
)
def test_invalid_http_is_refused(port: int, request_: bytes) -> None:
    with connected(port) as client:
        client.sendall(request_)
        assert refused(read_all(client)) == (400, "invalid_request")


def test_an_ordinary_request_may_have_large_headers_and_a_long_url(port: int) -> None:
    url = b"/?" + b"x" * 8000
    fields = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 500) for number in range(100))
    request = b"GET " + url + b" HTTP/1.1\r\n" + fields
    with connected(port) as client:
        for piece in (request[:30_000], request[30_000:], b"Connection: close\r\n\r\n"):
            client.sendall(piece)
            time.sleep(0.05)  # so that the pieces arrive one by one
        assert read_all(client).startswith(b"HTTP/1.1 200")


def test_a_body_behind_the_headers_does_not_count_as_headers(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 1000000\r\n"
    with connected(port) as client:
        client.sendall(head)
        time.sleep(0.05)
        client.sendall(b"\r\n" + bytes(1_000_000))
        assert read_all(client).endswith(b"\r\n\r\n1000000")


def test_pipelined_requests_are_answered_in_order_up_to_a_limit(port: int) -> None:
    with connected(port) as client:
        client.sendall(GET * 9 + GET.replace(b"Host", b"Connection: close\r\nHost"))
        assert read_all(client).count(b"HTTP/1.1 200") == 10
    with connected(port) as client:
        client.sendall(GET * 5000)
        with contextlib.suppress(ConnectionResetError):
            assert read_all(client).count(b"HTTP/1.1 200") < 5000


@pytest.mark.parametrize("request_", [GET, GET.replace(b"Host", b"Host " * 2)])
def test_every_answer_has_security_headers(port: int, request_: bytes) -> None:
    with connected(port) as client:
        client.sendall(request_.replace(b"Host", b"Connection: close\r\nHost"))
        head = read_all(client).partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert b"x-content-type-options: nosniff" in head
    assert b"x-frame-options: deny" in head
    assert b"cache-control: no-store" in head
    assert not [line for line in head if line.startswith(b"server:")]


def test_the_access_log_has_no_queries_and_bounded_paths(
    port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("uvicorn.access")  # uvicorn keeps it apart from the root
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    path = b"/%0Aforged%1B" + b"x" * 5000
    with caplog.at_level(logging.INFO, "uvicorn.access"), connected(port) as client:
        client.sendall(b"GET " + path + b"?key=secret HTTP/1.1\r\nConnection: close\r\n\r\n")
        read_all(client)
    (line,) = [each.getMessage() for each in caplog.records if each.name == "uvicorn.access"]
    assert "GET /%0Aforged%1Bxxx" in line
    assert "secret" not in line
    assert len(line) < 400


# ---------------------------------------------------------------------- slow clients


def trickle(client: socket.socket, piece: bytes) -> bytes:
    """Send `piece` ten times a second until the server closes the connection; returns its answer.
    Fails if the server does not mind."""
    deadline = time.monotonic() + PATIENCE_S
    client.settimeout(0.1)
    while time.monotonic() < deadline:
        client.sendall(piece)
        with contextlib.suppress(TimeoutError):
            first = client.recv(1 << 16)
            client.settimeout(PATIENCE_S)
            return first + read_all(client) if first else b""
    raise AssertionError("the server waits for ever")


@pytest.mark.parametrize("first", [b"", GET], ids=["new", "kept"])
def test_slow_headers_are_refused(port: int, first: bytes) -> None:
    with connected(port) as client:
        if first:
            client.sendall(first)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert refused(trickle(client, b"x")) == (408, "request_timeout")


@pytest.mark.parametrize("first", [b"", GET], ids=["new", "kept"])
def test_blank_lines_do_not_keep_a_connection(port: int, first: bytes) -> None:
    with connected(port) as client:
        if first:
            client.sendall(first)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert trickle(client, b"\r\n") == b""


def test_a_silent_connection_is_closed(port: int) -> None:
    with connected(port) as client:
        assert read_all(client) == b""


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_served(port: int) -> bool:
    try:
        with connected(port) as client:
            client.sendall(GET)
            return client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def test_a_client_that_never_reads_is_disconnected(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET /large HTTP/1.1\r\n\r\n")

        def is_reset() -> bool:
            try:
                client.send(b"x")
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        assert until(is_reset)


# ---------------------------------------------------------------------- many connections


def test_connections_beyond_the_limit_get_a_503_and_recover(port: int) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(port)) for _ in range(CONNECTIONS)]
        for client in clients:
            client.sendall(GET)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with connected(port) as late:
            received = read_all(late)
        assert refused(received) == (503, "server_busy")
        assert b"retry-after: " in received
        clients[0].sendall(GET)  # those that are connected stay so
        assert clients[0].recv(1 << 16).startswith(b"HTTP/1.1 200")

    assert until(lambda: is_served(port))


def test_when_files_run_short_connections_get_a_503_and_others_are_served(
    short_of_files: tuple[BaseProcess, Connection],
) -> None:
    process, connection = short_of_files
    connection.send("start")
    port = connection.recv()
    own = psutil.Process(process.pid)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(port)) for _ in range(100)]
        assert refused(read_all(clients[-1])) == (503, "server_busy")
        before = sum(own.cpu_times()[:2])
        time.sleep(2)
        assert sum(own.cpu_times()[:2]) - before < 1  # it does not spin
        clients[0].sendall(GET)  # connected before the files ran short
        assert clients[0].recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert until(lambda: is_served(port))

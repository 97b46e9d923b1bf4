"""A relay in front of a real Redis that breaks in many ways.

with BrokenRedis(redis.port) as relay:
    relay.fault = trickles
"""

import contextlib
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

from tests.hostile_origin import WAIT_S

PIECE = b"x" * 65536
SLOW_S = 3.0
# A call's time-out must not start again with each byte.
BETWEEN_BYTES_S = 0.1


class Client:
    """A connection to the relay, and where the real Redis is."""

    def __init__(self, plain: socket.socket, redis_port: int, stopped: threading.Event) -> None:
        self.socket = plain
        self.stopped = stopped
        self._redis_port = redis_port

    def redis(self) -> socket.socket:
        upstream = socket.create_connection(("127.0.0.1", self._redis_port), WAIT_S)
        upstream.settimeout(WAIT_S)
        return upstream

    def commands(self) -> bytes:
        """What the client sent next; empty at the end."""
        return self.socket.recv(65536)

    def has_sent(self, upstream: socket.socket) -> bool:
        """Wait for the client or the real Redis; returns whether it was the client."""
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            return True
        ready, _, _ = select.select([self.socket, upstream], [], [], WAIT_S)
        return self.socket in ready

    def reset(self) -> NoReturn:
        """Reset the connection, and raise the error that ends its thread."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        raise ConnectionResetError

    def wait(self, seconds: float = WAIT_S) -> bool:
        """Returns early, with True, when the relay stops or its fault changes."""
        return self.stopped.wait(seconds)


Fault = Callable[[Client], None]


# ---------------------------------------------------------------------- faults of every reply


def works(client: Client) -> None:
    forward(client, lambda reply: client.socket.sendall(reply))


def answers_late(client: Client) -> None:
    def late(reply: bytes) -> None:
        client.wait(SLOW_S)
        client.socket.sendall(reply)

    forward(client, late)


def trickles(client: Client) -> None:
    """Sends each reply a byte at a time, and never comes to an end."""

    def trickle(reply: bytes) -> None:
        for byte in reply[:-1] + b"0" * 10_000:
            client.socket.sendall(bytes([byte]))
            if client.wait(BETWEEN_BYTES_S):
                return

    forward(client, trickle)


def is_a_web_server(client: Client) -> None:
    page = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 6\r\n\r\nwrong\n"
    answer_all(client, lambda _: page)


def echoes(client: Client) -> None:
    """Sends back what it receives, also the password."""
    answer_all(client, lambda command: command)


def sends_garbage(client: Client) -> None:
    rng = random.Random(1)
    answer_all(client, lambda _: rng.randbytes(1000) + b"\r\n")


def closes_at_once(client: Client) -> None:
    client.socket.close()


def resets_at_once(client: Client) -> None:
    client.reset()


def never_answers(client: Client) -> None:
    while client.commands():
        pass


def never_reads(client: Client) -> None:
    client.wait()


# ---------------------------------------------------------------------- faults of one command


def on(command: bytes, fault: Callable[[Client, bytes], None]) -> Fault:
    """Breaks when the client sends `command`; all others are forwarded."""

    def serve(client: Client) -> None:
        forward(client, client.socket.sendall, lambda sent: command in sent, fault)

    return serve


def replies(reply: bytes) -> Callable[[Client, bytes], None]:
    return lambda client, _: client.socket.sendall(reply)


def floods(start: bytes, piece: bytes = PIECE) -> Callable[[Client, bytes], None]:
    """Announces with `start`, and sends `piece` as often and as fast as the client reads."""

    def flood(client: Client, _: bytes) -> None:
        client.socket.sendall(start)
        while not client.stopped.is_set():
            client.socket.sendall(piece)

    return flood


def drips(start: bytes) -> Callable[[Client, bytes], None]:
    def drip(client: Client, _: bytes) -> None:
        client.socket.sendall(start)
        while not client.wait(BETWEEN_BYTES_S):
            client.socket.sendall(b"x")

    return drip


def breaks(client: Client, _: bytes) -> None:
    """Resets the connection in the middle of a reply."""
    client.socket.sendall(b"$100000\r\nxxx")
    time.sleep(0.05)
    client.reset()


def dies(client: Client, _: bytes) -> None:
    """Resets the connection in the middle of a command."""
    client.reset()


def stops_reading(client: Client, _: bytes) -> None:
    client.wait()


# ---------------------------------------------------------------------- the relay


def forward(
    client: Client,
    answer: Callable[[bytes], None],
    is_broken: Callable[[bytes], bool] = lambda sent: False,
    fault: Callable[[Client, bytes], None] = lambda client, sent: None,
) -> None:
    """Send commands to the real Redis and `answer` with its replies; a command that `is_broken` is
    answered with `fault` instead."""
    with client.redis() as upstream:
        while True:
            # In one thread: a TLS connection must not be used by two.
            if client.has_sent(upstream):
                sent = client.commands()
                if not sent:
                    return
                if is_broken(sent):
                    fault(client, sent)
                else:
                    upstream.sendall(sent)
            else:
                reply = upstream.recv(65536)
                if not reply:
                    return
                answer(reply)


def answer_all(client: Client, reply: Callable[[bytes], bytes]) -> None:
    while sent := client.commands():
        client.socket.sendall(reply(sent))


class BrokenRedis:
    """The relay, in threads during its `with` block.

    Attributes:
        port: where it listens.
        connections: number of accepted connections.
    """

    def __init__(self, redis_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._redis_port = redis_port
        self._tls = tls
        self._fault: Fault = works
        self._changed = threading.Event()
        self._clients: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._is_open = True

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        """Break from now on; existing connections are closed."""
        self._fault = fault
        self._changed.set()
        self._changed = threading.Event()
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._clients.clear()

    def __enter__(self) -> Self:
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self.fault = closes_at_once
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while self._is_open:
                accepted, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        fault, changed = self._fault, self._changed
        with contextlib.suppress(OSError), accepted:
            if self._tls is not None:
                accepted.settimeout(WAIT_S)
                accepted = self._tls.wrap_socket(accepted, server_side=True)
            self._clients.append(accepted)
            with accepted:
                fault(Client(accepted, self._redis_port, changed))

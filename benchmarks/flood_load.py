"""The load generator for floods: many requests or connections at once, honest or hostile.

python -m benchmarks.flood_load < plan.json > result.json
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import uvloop

_CHATS = "/v1/chat/completions"
_LINE = f"POST {_CHATS} HTTP/1.1\r\n".encode()
_RECEIVE_BYTES = 1 << 16
# What the kernel takes of a body at a time. With its default of some megabytes, this process would
# copy for half a second before it sends the last of 500 heads and reads the first answer.
_SEND_BUFFER_BYTES = 1 << 16
_U = b"u" * (1 << 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, `count` times at once, for at most `seconds`.

    `flood` is a key of `FLOODS`; `parts` are files with the parts of a request's body, between
    which each request gets some bytes of its own (base64), so that no cache hits.
    """

    port: int
    flood: str
    count: int
    seconds: float
    parts: list[str]


@dataclass(slots=True)
class Outcome:
    """What became of one of them: the status, or "" if there was none; the code of an error.

    `answered_s`: seconds to the first byte of the answer. `ended`: how it ended: "closed" by the
    server, or "open" until the time was over.
    """

    status: str = ""
    code: str = ""
    answered_s: float | None = None
    ended: str = "open"
    received: int = 0


class Client:
    """One connection, and what was seen on it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._began = time.perf_counter()
        self.socket = socket.socket()
        self.outcome = Outcome()

    async def connect(self) -> None:
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        await self._loop.sock_connect(self.socket, ("127.0.0.1", self._port))
        self._began = time.perf_counter()

    async def send(self, *pieces: bytes) -> None:
        """Send all of it, without copies; whatever is left when the server closes is dropped."""
        with contextlib.suppress(OSError):
            for piece in pieces:
                await self._loop.sock_sendall(self.socket, piece)

    async def receive(self) -> None:
        """Read until the server closes the connection."""
        answer = b""
        with contextlib.suppress(OSError):
            while received := await self._loop.sock_recv(self.socket, _RECEIVE_BYTES):
                if self.outcome.answered_s is None:
                    self.outcome.answered_s = time.perf_counter() - self._began
                self.outcome.received += len(received)
                answer = (answer + received)[:4096]
                _read_answer(answer, self.outcome)
        self.outcome.ended = "closed"


def _read_answer(answer: bytes, outcome: Outcome) -> None:
    if answer.startswith(b"HTTP/1.1 ") and len(answer) > 12:
        outcome.status = answer[9:12].decode()
        _, _, code = answer.partition(b'"code":')
        if outcome.status != "200" and code:
            outcome.code = code.split(b",")[0].strip(b'"} \n').decode()


def _head(length: int) -> bytes:
    fields = (
        "Host: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    return _LINE + fields.encode()


Flood: TypeAlias = Callable[[Client, list[bytes]], Awaitable[None]]


async def _chat(client: Client, parts: list[bytes]) -> None:
    pieces = [parts[0]]
    for part in parts[1:]:
        pieces += [base64.b64encode(os.urandom(12)), part]
    head = _head(sum(map(len, pieces)))
    await asyncio.gather(client.send(head, *pieces), client.receive())


async def _announced(client: Client, parts: list[bytes]) -> None:
    """Only the head of a chat: what is measured is not how fast this process sends a body."""
    head = _head(sum(map(len, parts)))
    await asyncio.gather(client.send(head), client.receive())


def _dribble(begin: bytes, piece: bytes, pause_s: float) -> Flood:
    """Send `begin`, and then `piece` again and again until the server closes the connection."""

    async def flood(client: Client, parts: list[bytes]) -> None:
        async def send() -> None:
            await client.send(begin)
            while client.outcome.ended != "closed":
                await client.send(piece)
                await asyncio.sleep(pause_s)

        await asyncio.gather(send(), client.receive())

    return flood


async def _long_url(client: Client, parts: list[bytes]) -> None:
    pieces = [b"GET /", *[_U] * (30_000_000 // len(_U)), b" HTTP/1.1\r\n\r\n"]
    await asyncio.gather(client.send(*pieces), client.receive())


async def _idle(client: Client, parts: list[bytes]) -> None:
    await client.receive()


async def _never_reads(client: Client, parts: list[bytes]) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    await client.send(*[request] * 32)
    await asyncio.Event().wait()


FLOODS: dict[str, Flood] = {
    "chat": _chat,
    "announced": _announced,
    "slow_body": _dribble(_head(10_000_000), b" " * 100, 1.0),
    "slow_headers": _dribble(_LINE, b"x: y\r\n", 1.0),
    "endless_headers": _dribble(_LINE, b"x: " + b"y" * 65_536 + b"\r\n", 0.0),
    "long_url": _long_url,
    "idle": _idle,
    "never_reads": _never_reads,
}


async def drive(plan: Plan, parts: list[bytes]) -> list[Outcome]:
    """Start all clients at once, and end those that are left when the time is over."""
    clients = [Client(plan.port) for _ in range(plan.count)]

    async def one(client: Client) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(plan.seconds):
                await client.connect()
                await FLOODS[plan.flood](client, parts)

    await asyncio.gather(*map(one, clients))
    for client in clients:
        client.socket.close()
    return [client.outcome for client in clients]


def main() -> None:
    """Read the plan, carry it out, and print what became of it."""
    fields: dict[str, Any] = json.load(sys.stdin)
    plan = Plan(**fields)
    parts = [Path(part).read_bytes() for part in plan.parts]
    outcomes = uvloop.run(drive(plan, parts))
    json.dump([dataclasses.asdict(outcome) for outcome in outcomes], sys.stdout)


if __name__ == "__main__":
    main()

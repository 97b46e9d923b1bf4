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

from benchmarks.flood_burst import arrived, burst, note_arrivals, yield_processor

_CHATS = "/v1/chat/completions"
_LINE = f"POST {_CHATS} HTTP/1.1\r\n".encode()
_ANSWER_BYTES = 4096  # of an answer are looked at
# What each request has of its own after each picture: 12 bytes, as base64.
_OWN_BYTES, _OWN_BASE64 = 12, 16
_U = b"u" * (1 << 16)
_LONG_URL_BYTES = 30_000_000
_FIRST_URL_BYTES = 10_000  # above the limit of the server
_TOO_LONG = b"x: " + b"y" * 80_000 + b"\r\n"  # the same, of a header


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, `count` times at once, for at most `seconds`.

    `flood` is a key of `_BURSTS` or `_SLOW`; `parts` are files with the parts of a request's body,
    between which each request gets some bytes of its own (base64), so that no cache hits.
    """

    port: int
    flood: str
    count: int
    seconds: float
    parts: list[str]


@dataclass(slots=True)
class Outcome:
    """What became of one of them: the status, or "" if there was none; the code of an error.

    `answered_s`: seconds from the moment when the server could know what it answers (the head was
    sent, or so much of the URL that it is too long; the connection stood) to the first byte of the
    answer. `ended`: how it ended: "closed" by the
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
        self._began = time.time_ns()
        self.socket = socket.socket()
        self.outcome = Outcome()

    async def connect(self) -> None:
        self.socket.setblocking(False)
        note_arrivals(self.socket)
        self.begin()
        await self._loop.sock_connect(self.socket, ("127.0.0.1", self._port))

    def begin(self) -> None:
        """From now on, the server could answer."""
        self._began = time.time_ns()

    async def send(self, *pieces: bytes) -> None:
        """Send all of it, without copies; whatever is left when the server closes is dropped."""
        with contextlib.suppress(OSError):
            for piece in pieces:
                await self._loop.sock_sendall(self.socket, piece)

    async def receive(self) -> None:
        """Read until the server closes the connection."""
        answer = b""
        with contextlib.suppress(OSError):
            while True:
                await self._readable()
                received, at = arrived(self.socket)
                if not received:
                    break
                if self.outcome.answered_s is None:
                    self.outcome.answered_s = (at - self._began) / 1e9
                self.outcome.received += len(received)
                answer = (answer + received)[:_ANSWER_BYTES]
                _read_answer(answer, self.outcome)
        self.outcome.ended = "closed"

    async def _readable(self) -> None:
        arrival = self._loop.create_future()
        self._loop.add_reader(self.socket, arrival.set_result, None)
        try:
            await arrival
        finally:
            self._loop.remove_reader(self.socket)


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


Flood: TypeAlias = Callable[[Client], Awaitable[None]]
Rest: TypeAlias = Callable[[int], list[bytes]]


def _dribble(begin: bytes, piece: bytes, pause_s: float) -> Flood:
    """Send `begin`, and then `piece` again and again until the server closes the connection."""

    async def flood(client: Client) -> None:
        async def send() -> None:
            await client.send(begin)
            client.begin()
            while client.outcome.ended != "closed":
                await client.send(piece)
                await asyncio.sleep(pause_s)

        await asyncio.gather(send(), client.receive())

    return flood


async def _idle(client: Client) -> None:
    await client.receive()


async def _never_reads(client: Client) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    await client.send(*[request] * 32)
    await asyncio.Event().wait()


_SLOW: dict[str, Flood] = {
    "slow_body": _dribble(_head(10_000_000), b" " * 100, 1.0),
    "slow_headers": _dribble(_LINE, b"x: y\r\n", 1.0),
    "endless_headers": _dribble(_LINE + _TOO_LONG, _TOO_LONG, 0.0),
    "idle": _idle,
    "never_reads": _never_reads,
}


async def _drive(plan: Plan) -> list[Outcome]:
    """Start all clients at once, and end those that are left when the time is over."""
    clients = [Client(plan.port) for _ in range(plan.count)]
    await asyncio.gather(*[client.connect() for client in clients], return_exceptions=True)
    yield_processor()

    async def one(client: Client) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(plan.seconds):
                await _SLOW[plan.flood](client)

    await asyncio.gather(*map(one, clients))
    for client in clients:
        client.socket.close()
    return [client.outcome for client in clients]


def _chat(parts: list[bytes]) -> tuple[bytes, Rest]:
    length = sum(map(len, parts)) + _OWN_BASE64 * (len(parts) - 1)

    def rest(number: int) -> list[bytes]:
        pieces = [parts[0]]
        for part in parts[1:]:
            pieces += [base64.b64encode(os.urandom(_OWN_BYTES)), part]
        return pieces

    return _head(length), rest


def _announced(parts: list[bytes]) -> tuple[bytes, Rest]:
    """Only the head of a chat."""
    head, _ = _chat(parts)
    return head, lambda number: []


def _long_url(parts: list[bytes]) -> tuple[bytes, Rest]:
    pieces = [*[_U] * (_LONG_URL_BYTES // len(_U)), b" HTTP/1.1\r\n\r\n"]
    return b"GET /" + _U[:_FIRST_URL_BYTES], lambda number: pieces


# What each request sends first, and then, by its number.
_BURSTS: dict[str, Callable[[list[bytes]], tuple[bytes, Rest]]] = {
    "chat": _chat,
    "announced": _announced,
    "long_url": _long_url,
}


def _burst(plan: Plan, parts: list[bytes]) -> list[Outcome]:
    outcomes = [Outcome() for _ in range(plan.count)]
    answers = [b""] * plan.count

    def note(number: int, seconds: float, received: bytes) -> None:
        outcome = outcomes[number]
        if not received:
            outcome.ended = "closed"
            return
        if outcome.answered_s is None:
            outcome.answered_s = seconds
        outcome.received += len(received)
        answers[number] = (answers[number] + received)[:_ANSWER_BYTES]

    first, rest = _BURSTS[plan.flood](parts)
    burst(plan.port, [first] * plan.count, rest, plan.seconds, note)
    for outcome, answer in zip(outcomes, answers, strict=True):
        _read_answer(answer, outcome)
    return outcomes


def main() -> None:
    """Read the plan, carry it out, and print what became of it."""
    fields: dict[str, Any] = json.load(sys.stdin)
    plan = Plan(**fields)
    parts = [Path(part).read_bytes() for part in plan.parts]
    outcomes = _burst(plan, parts) if plan.flood in _BURSTS else uvloop.run(_drive(plan))
    json.dump([dataclasses.asdict(outcome) for outcome in outcomes], sys.stdout)


if __name__ == "__main__":
    main()

"""The control channel between the server and the connectors in its engine processes.

The server binds a socket in a private directory, to which every connector connects. The server
sends a `Command`, with a number if it needs an answer. A connector sends a `Reply` when its counts
have changed, and one with the number as an answer.
"""

import asyncio
import contextlib
import itertools
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import zmq
import zmq.asyncio

from server.concurrency import cancel
from server.engine.embedding_cache.arena import LastingMemory

log = logging.getLogger("saccade.embeddings")

_REPORT_INTERVAL_S = 1.0
_REPEAT_INTERVAL_S = 10.0
_ANSWER_TIMEOUT_S = 2.0
# Commands that may wait for a busy engine; more are dropped.
_MOST_WAITING = 10_000

# Sizes and counts of one engine's caches: tier -> name -> value.
Snapshot: TypeAlias = dict[str, dict[str, Any]]


class Prefetch(msgspec.Struct, frozen=True, tag="prefetch"):
    """Start to look up images that are needed soon: (name, tokens) of each."""

    images: list[tuple[str, int]]


class ExpectReset(msgspec.Struct, frozen=True, tag="expect_reset"):
    """vLLM's encoder cache is going to be reset without a change of weights."""


class Clear(msgspec.Struct, frozen=True, tag="clear"):
    """Delete all entries, also on disk and in the shared store."""


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Do nothing; the answer has the snapshot."""


Action: TypeAlias = Prefetch | ExpectReset | Clear | Describe


class Command(msgspec.Struct, frozen=True):
    """A message of the server; `number` is None if it needs no answer."""

    action: Action
    number: int | None = None


class Reply(msgspec.Struct, frozen=True):
    """A message of a connector; `number` is that of the answered command, if any."""

    snapshot: Snapshot
    number: int | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_command = msgspec.msgpack.Decoder(Command).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class _Question(NamedTuple):
    """The engines that have not answered yet, and an event for when all have."""

    silent: set[bytes]
    answered: asyncio.Event


class ControlServer:
    """The server's end. Create it before the engine starts; use it inside `async with`.

    Attributes:
        memory: that of the host tier, if it outlives the engine. It is closed with this.
    """

    memory: LastingMemory | None = None

    def __init__(self, address: str | None = None) -> None:
        """`address`: that which the connectors know already, by default a new one."""
        self._directory = None if address else Path(tempfile.mkdtemp(prefix="saccade-"))
        self.address = address or f"ipc://{self._directory}/embeddings"
        self.snapshots: dict[bytes, Snapshot] = {}
        self._numbers = itertools.count()
        self._asked: dict[int, _Question] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, _MOST_WAITING)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.address)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "ControlServer":
        self._task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await cancel(self._task)
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        if self.memory is not None:
            self.memory.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def prefetch(self, images: Sequence[tuple[str, int]]) -> None:
        """Announce images that are needed soon: (name, tokens) of each. Does not wait."""
        self._send(Command(Prefetch(list(images))))

    async def expect_reset(self) -> bool:
        """Announce that vLLM's encoder cache is going to be reset without a change of weights.

        Returns whether every engine has answered.
        """
        return await self._ask(ExpectReset())

    async def clear(self) -> None:
        """Delete all entries, also on disk and in the shared store."""
        await self._ask(Clear())

    async def report(self) -> list[Snapshot]:
        """Each engine's snapshot; the last known one if an engine does not answer."""
        await self._ask(Describe())
        return list(self.snapshots.values())

    async def _ask(self, action: Action) -> bool:
        """Send, and wait up to `_ANSWER_TIMEOUT_S` for all engines. Returns whether all have
        answered."""
        if not self.snapshots:
            return False
        number = next(self._numbers)
        question = self._asked[number] = _Question(set(self.snapshots), asyncio.Event())
        self._send(Command(action, number))
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(question.answered.wait(), _ANSWER_TIMEOUT_S)
            return question.answered.is_set()
        finally:
            del self._asked[number]

    def _send(self, command: Command) -> None:
        data = _encode(command)
        for engine in self.snapshots:
            self._socket.send_multipart([engine, data], zmq.DONTWAIT)

    async def _listen(self) -> None:
        while True:
            engine, data = await self._socket.recv_multipart()
            reply = _decode_reply(data)
            self.snapshots[engine] = reply.snapshot
            question = self._asked.get(reply.number) if reply.number is not None else None
            if question is not None:
                question.silent.discard(engine)
                if not question.silent:
                    question.answered.set()


class ControlClient:
    """A connector's end: a thread that executes commands and reports changed counts, and once in a
    while unchanged ones, for a server's end that is new."""

    def __init__(
        self,
        address: str,
        identity: str,
        execute: Callable[[Action], None],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._execute = execute
        self._snapshot = snapshot
        self._stopped = threading.Event()
        self._last: Snapshot | None = None
        self._report_at = self._repeat_at = 0.0
        args = (address, identity.encode())
        self._thread = threading.Thread(target=self._run, args=args, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(2 * _REPORT_INTERVAL_S)

    def _run(self, address: str, identity: bytes) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        try:
            self._report(socket, None)  # the server commands only those that it has heard of
            while not self._stopped.is_set():
                number = None
                if socket.poll(int(_REPORT_INTERVAL_S * 1000)):
                    command = _decode_command(socket.recv())
                    number = command.number
                    self._do(command.action)
                self._report(socket, number)
        finally:
            socket.close()
            context.term()

    def _do(self, action: Action) -> None:
        try:
            self._execute(action)
        except Exception:
            log.exception("the embedding cache failed to execute a command")

    def _report(self, socket: Any, number: int | None) -> None:
        """Send the snapshot: as an answer, or once per `_REPORT_INTERVAL_S` if it has changed."""
        if number is None and time.monotonic() < self._report_at:
            return
        self._report_at = time.monotonic() + _REPORT_INTERVAL_S
        snapshot = self._snapshot()
        is_due = time.monotonic() >= self._repeat_at
        if number is not None or is_due or snapshot != self._last:
            self._last = snapshot
            self._repeat_at = time.monotonic() + _REPEAT_INTERVAL_S
            socket.send(_encode(Reply(snapshot, number)))

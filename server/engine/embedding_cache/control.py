"""The line between the server and the connectors in its engine processes.

The server binds a socket in a private directory and every connector connects. The server sends a
`Request`, with a number if it wants an answer. A connector sends a `Reply` when there is something
new to report, and one with the number to answer.
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

log = logging.getLogger("saccade.embeddings")

_REPORT_INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
# Orders that wait for an engine that does not take them; more are dropped.
_MOST_WAITING = 10_000

# What the caches of one engine hold and have counted: by tier, by name.
Snapshot: TypeAlias = dict[str, dict[str, Any]]


class Prefetch(msgspec.Struct, frozen=True, tag="prefetch"):
    """Look for images that will be asked for: (name, tokens) of each."""

    images: list[tuple[str, int]]


class ExpectReset(msgspec.Struct, frozen=True, tag="expect_reset"):
    """vLLM's encoder cache will be emptied with the weights as they are."""


class Clear(msgspec.Struct, frozen=True, tag="clear"):
    """Forget everything, also on disk and in the shared store."""


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Do nothing but answer."""


Order: TypeAlias = Prefetch | ExpectReset | Clear | Describe


class Request(msgspec.Struct, frozen=True):
    """What the server sends; `number` is None where it wants no answer."""

    order: Order
    number: int | None = None


class Reply(msgspec.Struct, frozen=True):
    """What a connector sends; `number` is that of the request it answers, if it answers one."""

    snapshot: Snapshot
    number: int | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(Request).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


class _Question(NamedTuple):
    """Which engines have not answered yet, and whether all have."""

    silent: set[bytes]
    answered: asyncio.Event


class ControlServer:
    """The server's end. Make it before the engine starts; use it inside `async with`."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="saccade-"))
        self.address = f"ipc://{self._directory}/embeddings"
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
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    def prefetch(self, images: Sequence[tuple[str, int]]) -> None:
        """Say that images will be asked for: (name, tokens) of each. Never waits."""
        self._send(Request(Prefetch(list(images))))

    async def expect_reset(self) -> bool:
        """Say that vLLM's encoder cache will be emptied with the weights as they are.

        Returns whether every engine has answered.
        """
        return await self._ask(ExpectReset())

    async def clear(self) -> None:
        """Forget everything, also on disk and in the shared store."""
        await self._ask(Clear())

    async def report(self) -> list[Snapshot]:
        """What each engine's caches hold now; the last known where one does not answer."""
        await self._ask(Describe())
        return list(self.snapshots.values())

    async def _ask(self, order: Order) -> bool:
        """Send, and wait a while until every engine has answered. Returns whether all have."""
        if not self.snapshots:
            return False
        number = next(self._numbers)
        question = self._asked[number] = _Question(set(self.snapshots), asyncio.Event())
        self._send(Request(order, number))
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(question.answered.wait(), _ANSWER_TIMEOUT_S)
            return question.answered.is_set()
        finally:
            del self._asked[number]

    def _send(self, request: Request) -> None:
        data = _encode(request)
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
    """A connector's end: a thread that obeys orders, and reports when there is something new."""

    def __init__(
        self,
        address: str,
        identity: str,
        obey: Callable[[Order], None],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._obey = obey
        self._snapshot = snapshot
        self._stopped = threading.Event()
        self._last: Snapshot | None = None
        self._report_at = 0.0
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
            while not self._stopped.is_set():
                number = None
                if socket.poll(int(_REPORT_INTERVAL_S * 1000)):
                    request = _decode_request(socket.recv())
                    number = request.number
                    self._do(request.order)
                self._report(socket, number)
        finally:
            socket.close()
            context.term()

    def _do(self, order: Order) -> None:
        try:
            self._obey(order)
        except Exception:
            log.exception("the embedding cache failed to obey an order")

    def _report(self, socket: Any, number: int | None) -> None:
        """Send the snapshot: as an answer, or now and then if it has changed."""
        if number is None and time.monotonic() < self._report_at:
            return
        self._report_at = time.monotonic() + _REPORT_INTERVAL_S
        snapshot = self._snapshot()
        if number is not None or snapshot != self._last:
            self._last = snapshot
            socket.send(_encode(Reply(snapshot, number)))

"""The line between the server and the connectors in its engine processes.

The server binds a socket in a directory of its own and every connector connects. Messages are
msgpack maps: orders of the server have `do`, and a number in `ask` if they want an answer; a
connector reports with its `snapshot`, and answers with the same and the number in `answer`.
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
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.asyncio

log = logging.getLogger("saccade.embeddings")

_REPORT_INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
# Orders that wait for an engine that does not take them; more are dropped.
_MOST_WAITING = 10_000

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode

Snapshot = dict[str, Any]


class _Question(NamedTuple):
    """Which engines have not answered yet, and whether all have."""

    silent: set[bytes]
    answered: asyncio.Event


class ControlServer:
    """The server's end: to be made before the engine starts, and used while `async with` lasts."""

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
        self._send({"do": "prefetch", "images": images})

    async def expect_reset(self) -> bool:
        """Say that vLLM's encoder cache will be emptied with the weights as they are; whether every
        engine has heard it."""
        return await self._ask({"do": "expect_reset"})

    async def clear(self) -> None:
        """Forget everything, also on disk and in the shared store."""
        await self._ask({"do": "clear"})

    async def report(self) -> list[Snapshot]:
        """What each engine's caches hold now; the last known where one does not answer."""
        await self._ask({"do": "report"})
        return list(self.snapshots.values())

    async def _ask(self, message: dict[str, Any]) -> bool:
        """Send, and wait until every engine has answered, for a while; whether they have."""
        if not self.snapshots:
            return False
        number = next(self._numbers)
        question = self._asked[number] = _Question(set(self.snapshots), asyncio.Event())
        self._send(message | {"ask": number})
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(question.answered.wait(), _ANSWER_TIMEOUT_S)
            return question.answered.is_set()
        finally:
            del self._asked[number]

    def _send(self, message: dict[str, Any]) -> None:
        data = _encode(message)
        for engine in self.snapshots:
            self._socket.send_multipart([engine, data], zmq.DONTWAIT)

    async def _listen(self) -> None:
        while True:
            engine, data = await self._socket.recv_multipart()
            message = _decode(data)
            self.snapshots[engine] = message["snapshot"]
            if (question := self._asked.get(message["answer"])) is not None:
                question.silent.discard(engine)
                if not question.silent:
                    question.answered.set()


class ControlClient:
    """A connector's end: a thread that does orders, and reports when there is something new."""

    def __init__(
        self,
        address: str,
        identity: str,
        obey: Callable[[dict[str, Any]], None],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self._obey = obey
        self._snapshot = snapshot
        self._stopped = threading.Event()
        self._last: Snapshot | None = None
        self._tell_at = 0.0
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
                answer = None
                if socket.poll(int(_REPORT_INTERVAL_S * 1000)):
                    order = _decode(socket.recv())
                    answer = order.get("ask")
                    self._do(order)
                self._tell(socket, answer)
        finally:
            socket.close()
            context.term()

    def _do(self, order: dict[str, Any]) -> None:
        try:
            self._obey(order)
        except Exception:
            log.exception("an order to the embedding cache failed")

    def _tell(self, socket: Any, answer: int | None) -> None:
        if answer is None and time.monotonic() < self._tell_at:
            return
        self._tell_at = time.monotonic() + _REPORT_INTERVAL_S
        snapshot = self._snapshot()
        if answer is not None or snapshot != self._last:
            self._last = snapshot
            socket.send(_encode({"snapshot": snapshot, "answer": answer}))

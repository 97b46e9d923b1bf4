"""Runs the requests of one batch: each as soon as it gets a turn, until all have a result.

A request that the server refuses because it is busy is no result: it waits and runs again.
"""

import asyncio
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import msgspec

from server.batches.lines import Item, Lines
from server.batches.results import Response, Result, Results
from server.errors import FileStorageFailed, ServerBusy, WorkerLost

log = logging.getLogger("saccade")

# Answers that say that the server cannot take the request now.
_BUSY = frozenset({429, 503})
_BUSY_PAUSE_S = 1.0
_MOST_LOSSES = 5
_MAX_PAUSE_S = 60.0
_STORAGE_PAUSE_S = 5.0
_FILLED_AT_A_TIME = 256


class Answer(NamedTuple):
    """The answer to a request. `retry_after_s` is 0 if it does not say."""

    status: int
    body: bytes
    retry_after_s: float = 0.0


class Turn(Protocol):
    """The right of one request to run."""

    def release(self) -> None: ...


class Asking(Protocol):
    """How the requests of a batch are answered."""

    async def turn(self) -> Turn:
        """Wait until the next request may run."""

    async def ask(self, item: Item, request_id: str, turn: Turn) -> Answer:
        """Answer a request."""


class ItemLoop:
    """Runs the requests of `lines` that have no result yet, and writes their results."""

    def __init__(
        self,
        lines: Lines,
        results: Results,
        asking: Asking,
        id_of: Callable[[int], str],
        on_result: Callable[[], None],
    ) -> None:
        """`id_of` gives the id of the request with a number; `on_result` is called for each."""
        self._lines = lines
        self._results = results
        self._asking = asking
        self._id_of = id_of
        self._on_result = on_result
        self._again: deque[int] = deque()
        self._losses: Counter[int] = Counter()
        self._pause_until = 0.0
        self._running = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Run them all. If it is cancelled, so are those that run."""
        fresh = (n for n in range(len(self._lines)) if not self._results.is_done(n))
        async with asyncio.TaskGroup() as tasks:
            while (number := await self._next(fresh)) is not None:
                await self._pause()
                turn = await self._asking.turn()
                task = tasks.create_task(self._run(number, turn))
                self._running += 1
                task.add_done_callback(functools.partial(self._end, number, turn))

    async def _next(self, fresh: Iterator[int]) -> int | None:
        """The next request that has to run; None if all have a result."""
        while True:
            if self._again:
                return self._again.popleft()
            if (number := next(fresh, None)) is not None or not self._running:
                return number
            self._changed.clear()
            await self._changed.wait()

    async def _pause(self) -> None:
        while (left_s := self._pause_until - time.monotonic()) > 0:  # noqa: ASYNC110 - it may grow
            await asyncio.sleep(left_s)

    def _end(self, number: int, turn: Turn, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # perhaps by its own work: a group of tasks does not count that
            self._repeat(number, _BUSY_PAUSE_S)
        self._running -= 1
        turn.release()
        self._changed.set()

    async def _run(self, number: int, turn: Turn) -> None:
        try:
            item = await asyncio.to_thread(self._lines.item, number)
            answer = await self._asking.ask(item, self._id_of(number), turn)
            if answer.status in _BUSY and not self._kills_workers(number, answer):
                self._repeat(number, answer.retry_after_s or _BUSY_PAUSE_S)
                return
            await self._results.append(number, self._result(number, item, answer))
            self._on_result()
        except (FileStorageFailed, ServerBusy, OSError) as error:
            log.warning("a result of a batch cannot be stored, or its input not be read: %s", error)
            self._repeat(number, _STORAGE_PAUSE_S)

    def _kills_workers(self, number: int, answer: Answer) -> bool:
        """Whether the workers of this request die again and again, which is its own fault."""
        if WorkerLost.code.encode() not in answer.body:
            return False
        self._losses[number] += 1
        return self._losses[number] >= _MOST_LOSSES

    def _repeat(self, number: int, pause_s: float) -> None:
        self._again.append(number)
        self._pause_until = time.monotonic() + min(pause_s, _MAX_PAUSE_S)

    def _result(self, number: int, item: Item, answer: Answer) -> Result:
        request_id = self._id_of(number)
        return Result(
            request_id, item.custom_id, Response(answer.status, request_id, _json(answer.body))
        )


def _json(body: bytes) -> msgspec.Raw:
    """`body`, or a string with its text if it is not JSON."""
    try:
        return msgspec.json.decode(body, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return msgspec.Raw(msgspec.json.encode(body.decode("utf-8", "replace")))


async def fill(
    lines: Lines,
    results: Results,
    id_of: Callable[[int], str],
    error: dict[str, str],
) -> None:
    """Write `error` as the result of each request that has none.

    Raises:
        FileStorageFailed, OSError
    """
    missing = [number for number in range(len(lines)) if not results.is_done(number)]
    for start in range(0, len(missing), _FILLED_AT_A_TIME):
        chunk = missing[start : start + _FILLED_AT_A_TIME]
        names = [(await asyncio.to_thread(lines.item, number)).custom_id for number in chunk]
        await asyncio.gather(
            *(
                results.append(number, Result(id_of(number), name, None, error))
                for number, name in zip(chunk, names, strict=True)
            )
        )

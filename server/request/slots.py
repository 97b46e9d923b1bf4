"""Slots that requests hold while they work; those that wait for one are served in a fair order."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from server.request.fair_queue import FairQueue

_RESERVED_SHARE = 8


class _Waiter(NamedTuple):
    group: str
    turn: asyncio.Future[None]


class Slots:
    """At most `count` slots are taken. A few more are reserved for groups that have none, so that
    a group with few requests does not wait for the end of another's. None are given while
    `is_closed` says so; when that changes, `advance` has to be called."""

    def __init__(self, count: int, is_closed: Callable[[], bool] = lambda: False) -> None:
        self.count = count
        self._is_closed = is_closed
        self.taken = 0
        self.queue: FairQueue[_Waiter] = FairQueue()
        self._reserved = max(1, count // _RESERVED_SHARE)
        self._by_group: Counter[str] = Counter()

    def take_now(self, group: str) -> bool:
        """Take a slot for `group` if that is possible without waiting."""
        if self._is_closed():
            return False
        if self.taken >= self.count or self.queue:
            is_first = bool(self._by_group) and group not in self._by_group
            if not is_first or self.taken >= self.count + self._reserved:
                return False
        self.add(group)
        return True

    async def take(self, group: str, share: float, cost: float = 1.0) -> None:
        """Take a slot for `group`; wait for it if there is none. `share` and `cost` determine the
        turn, see `FairQueue.push`."""
        if self.take_now(group):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = self.queue.push(group, share, cost, _Waiter(group, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not entry.is_gone:
                self.queue.remove(entry)
            elif not turn.cancelled():  # it got its turn at the same moment
                self.free(group)
            raise

    def add(self, group: str) -> None:
        """Take a slot for `group` at once, even if there is none."""
        self.taken += 1
        self._by_group[group] += 1

    def free(self, group: str) -> None:
        """Give a slot of `group` back: the next one's turn."""
        self.taken -= 1
        self._by_group[group] -= 1
        if not self._by_group[group]:
            del self._by_group[group]
        self.advance()

    def advance(self) -> None:
        """Give the free slots to those that wait."""
        while self.queue and self.taken < self.count and not self._is_closed():
            waiter = self.queue.pop()
            if not waiter.turn.done():
                self.add(waiter.group)
                waiter.turn.set_result(None)

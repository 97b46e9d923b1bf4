"""Slots that requests hold while they work; those that wait for one are served in a fair order."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from server.request.fair_queue import FairQueue

_RESERVED_SHARE = 8
# A group counts as active for so long after it took a slot.
_ACTIVE_S = 30.0


class _Waiter(NamedTuple):
    group: str
    turn: asyncio.Future[None]


class Slots:
    """At most `count` slots are taken. A few more are reserved for groups that have none, so that
    a group with few requests does not wait for the end of another's. While another group is active,
    a group takes at most `group_share` of the slots. None are given while `is_closed` says so; when
    that changes, `advance` has to be called."""

    def __init__(
        self,
        count: int,
        is_closed: Callable[[], bool] = lambda: False,
        group_share: float = 1.0,
    ) -> None:
        self.count = count
        self._is_closed = is_closed
        self._most_of_group = max(1, int(count * group_share))
        self.taken = 0
        self.queue: FairQueue[_Waiter] = FairQueue()
        self._reserved = max(1, count // _RESERVED_SHARE)
        self._by_group: Counter[str] = Counter()
        self._took_at: dict[str, float] = {}  # of active groups, the last to take a slot at the end

    def take_now(self, group: str) -> bool:
        """Take a slot for `group` if that is possible without waiting."""
        if not self.has_room(group):
            return False
        self.add(group)
        return True

    def has_room(self, group: str) -> bool:
        """Whether `group` could take a slot without waiting."""
        if self._is_closed() or self._has_its_share(group):
            return False
        if self.taken < self.count:  # those that wait have their share
            return True
        is_first = bool(self._by_group) and group not in self._by_group
        return is_first and self.taken < self.count + self._reserved

    async def take(self, group: str, share: float, cost: float = 1.0) -> None:
        """Take a slot for `group`; wait for it if there is none. `share` and `cost` determine the
        turn, see `FairQueue.push`."""
        if self.take_now(group):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = self.queue.push(group, share, cost, _Waiter(group, turn))
        self.advance()  # those before it may be of a group that has its share
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
        now = time.monotonic()
        self._took_at.pop(group, None)
        self._took_at[group] = now
        while now - next(iter(self._took_at.values())) > _ACTIVE_S:
            del self._took_at[next(iter(self._took_at))]

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
            full = set(filter(self._has_its_share, self._by_group))
            waiter = self.queue.pop(lambda each: each.group not in full)  # noqa: B023
            if waiter is None:
                return
            if not waiter.turn.done():
                self.add(waiter.group)
                waiter.turn.set_result(None)

    def _has_its_share(self, group: str) -> bool:
        """Whether `group` may take no slot because another group is active."""
        if self._by_group[group] < self._most_of_group or self._most_of_group == self.count:
            return False
        others = (at for name, at in reversed(self._took_at.items()) if name != group)
        return len(self._by_group) > 1 or time.monotonic() - next(others, -math.inf) < _ACTIVE_S

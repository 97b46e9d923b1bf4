"""Slots that requests hold while they work; those that wait for one are served in a fair order."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

from server.request.fair_queue import FairQueue

_RESERVED_SHARE = 8
# For so long after a request took a slot, work in the background takes an eighth of its slots.
_QUIET_S = 5.0
_BACKGROUND_SHARE = 8
# A group counts as active for so long after it took a slot.
_ACTIVE_S = 10.0


class _Waiter(NamedTuple):
    group: str
    turn: asyncio.Future[None]


class Slots:
    """At most `count` slots are taken. A few more are reserved for groups that have none, so that
    a group with few requests does not wait for the end of another's. While another group is active,
    a group takes at most `group_share` of the slots, or an equal part of all if several wait. When
    a group with fewer takes a slot, or will soon, groups that have their share get none for
    `head_start_s`, or until it has no slot, but at most half of the time. None are given while
    `is_closed` says so; when that changes, `advance` has to be called.

    Work in the background waits in a queue of its own. It gets a slot only if nobody else waits or
    has a head start, and leaves some slots free, so that a request which arrives then begins at
    once. While others take slots, it takes an eighth of its own: the more work is in progress, the
    longer each takes.
    """

    def __init__(
        self,
        count: int,
        is_closed: Callable[[], bool] = lambda: False,
        group_share: float = 1.0,
        head_start_s: float = 0.0,
        most_background: int | None = None,
    ) -> None:
        """`most_background` limits the slots of work in the background further."""
        self.count = count
        self._is_closed = is_closed
        self._most_of_group = max(1, int(count * group_share))
        self.taken = 0
        self.queue: FairQueue[_Waiter] = FairQueue()
        self.background: FairQueue[_Waiter] = FairQueue()
        self._reserved = max(1, count // _RESERVED_SHARE)
        self._by_group: Counter[str] = Counter()
        self._waiting_by_group: Counter[str] = Counter()
        self._took_at: dict[str, float] = {}  # of active groups, the last to take a slot at the end
        self._head_start_s = head_start_s
        self._ahead: str | None = None  # the group that has a head start
        self._behind: set[str] = set()  # those that get no slots meanwhile
        self._head_start_began = self._next_head_start = -math.inf
        self._end_of_head_start: asyncio.TimerHandle | None = None
        self._in_background = 0
        self._last_took_at = -math.inf
        most = count if most_background is None else most_background
        self.most_background = max(1, min(count - self._reserved, most))

    def take_now(self, group: str) -> bool:
        """Take a slot for `group` if that is possible without waiting."""
        if not self.has_room(group):
            return False
        self.add(group)
        return True

    def has_room(self, group: str) -> bool:
        """Whether `group` could take a slot without waiting."""
        if self._is_closed() or self._must_wait(group):
            return False
        if self.taken < self.count:  # those that wait must wait
            return True
        others = bool(self._by_group) or self._in_background > 0
        is_first = others and group not in self._by_group
        return is_first and self.taken < self.count + self._reserved

    async def take(self, group: str, share: float, cost: float = 1.0) -> None:
        """Take a slot for `group`; wait for it if there is none. `share` and `cost` determine the
        turn, see `FairQueue.push`."""
        if not self.take_now(group):
            await self._wait(self.queue, group, share, cost, self.free)

    async def take_background(self, group: str, share: float) -> None:
        """Take a slot for work in the background, as soon as nobody else waits for one."""
        if not self.background and self._may_take_background():
            self.add_background()
        else:
            await self._wait(self.background, group, share, 1.0, lambda _: self.free_background())

    async def _wait(
        self,
        queue: FairQueue[_Waiter],
        group: str,
        share: float,
        cost: float,
        give_back: Callable[[str], None],
    ) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = queue.push(group, share, cost, _Waiter(group, turn))
        waiting = self._waiting_by_group if queue is self.queue else Counter[str]()
        waiting[group] += 1
        self.advance()  # those before it may be of a group that has its share
        try:
            await turn
        except asyncio.CancelledError:
            if not entry.is_gone:
                queue.remove(entry)
            elif not turn.cancelled():  # it got its turn at the same moment
                give_back(group)
            raise
        finally:
            waiting[group] -= 1
            if not waiting[group]:
                del waiting[group]

    def add(self, group: str) -> None:
        """Take a slot for `group` at once, even if there is none."""
        self.taken += 1
        self._by_group[group] += 1
        now = self._last_took_at = time.monotonic()
        self._took_at.pop(group, None)
        self._took_at[group] = now
        while now - next(iter(self._took_at.values())) > _ACTIVE_S:
            del self._took_at[next(iter(self._took_at))]
        self.expect(group)

    def expect(self, group: str) -> None:
        """A request of `group` takes a slot, or will soon: its head start begins now."""
        now, most = time.monotonic(), self._most_of_group
        if not self._head_start_s or now < self._next_head_start or self._count_of(group) >= most:
            return
        self._behind = {name for name, count in self._by_group.items() if count >= most}
        if self._behind:
            self._ahead, self._head_start_began, self._next_head_start = group, now, math.inf
            self._end_of_head_start = asyncio.get_running_loop().call_later(
                self._head_start_s, self._end_head_start
            )

    def _count_of(self, group: str) -> int:
        return self._by_group.get(group, 0)

    def _end_head_start(self) -> None:
        """No other one begins for as long as this one lasted."""
        assert self._end_of_head_start is not None
        self._end_of_head_start.cancel()
        now = time.monotonic()
        self._ahead, self._behind = None, set()
        self._next_head_start = 2 * now - self._head_start_began
        self.advance()

    def free(self, group: str) -> None:
        """Give a slot of `group` back: the next one's turn."""
        self.taken -= 1
        self._by_group[group] -= 1
        if not self._by_group[group]:
            del self._by_group[group]
            if group == self._ahead:
                self._end_head_start()
        self.advance()

    def add_background(self) -> None:
        """As `add`, for work in the background."""
        self._in_background += 1
        self.taken += 1

    def free_background(self) -> None:
        """Give a slot back that `take_background` gave."""
        self._in_background -= 1
        self.taken -= 1
        self.advance()

    def advance(self) -> None:
        """Give the free slots to those that wait."""
        while self.queue and self.taken < self.count and not self._is_closed():
            full = set(filter(self._must_wait, self._by_group)) | self._behind
            if not self._give(self.queue, self.add, full):
                return
        while self.background and self._may_take_background():
            self._give(self.background, lambda _: self.add_background())

    def _may_take_background(self) -> bool:
        most = self.most_background
        is_free = self.taken < most
        if time.monotonic() - self._last_took_at < _QUIET_S:
            most = max(1, most // _BACKGROUND_SHARE)
        is_free = is_free and self._in_background < most
        is_alone = not self.queue and self._ahead is None
        return is_free and is_alone and not self._is_closed()

    @staticmethod
    def _give(
        queue: FairQueue[_Waiter], add: Callable[[str], None], but: Collection[str] = ()
    ) -> bool:
        """Give a slot to the first that waits and is of no group `but`; whether there is one."""
        waiter = queue.pop(lambda each: each.group not in but)
        if waiter is not None and not waiter.turn.done():
            add(waiter.group)
            waiter.turn.set_result(None)
        return waiter is not None

    def _must_wait(self, group: str) -> bool:
        """Whether `group` may take no slot because another group is active."""
        if group in self._behind:
            return True
        if self._by_group[group] < self._most(group):
            return False
        others = (at for name, at in reversed(self._took_at.items()) if name != group)
        return len(self._by_group) > 1 or time.monotonic() - next(others, -math.inf) < _ACTIVE_S

    def _most(self, group: str) -> int:
        """The slots that `group` may take while another is active: its share; an equal part of all
        if others wait as well, so that no slot stays free while several groups flood."""
        waiting = len(self._waiting_by_group.keys() | {group})
        return max(self._most_of_group, self.count // waiting if waiting > 1 else 0)

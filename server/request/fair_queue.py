"""A queue that is fair among groups of keys: start-time fair queueing.

    P. Goyal, H. M. Vin, H. Cheng: Start-time Fair Queueing. SIGCOMM 1996.

Each item gets a start tag: the virtual time, or the end of the last item of its group if that is
later. An item of cost c lasts c / share. The item with the lowest start tag comes first, and its
start tag becomes the virtual time. So a group with a long queue does not delay the first item of
another, and groups that wait get work in proportion to their shares.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(order=True)
class Entry(Generic[T]):
    """An item in the queue. `start` and `number` order it."""

    start: float
    number: int
    cost: float = field(compare=False)
    item: T = field(compare=False)
    is_gone: bool = field(default=False, compare=False)


class FairQueue(Generic[T]):
    """Items of groups, in a fair order.

    The entries are a sorted list. To insert one moves pointers, which takes about a microsecond for
    thousands of them, and the costs beside them are summed without a step of Python for each.
    """

    def __init__(self) -> None:
        self._entries: list[Entry[T]] = []
        self._costs: list[float] = []
        self._ends: dict[str, float] = {}
        self._now = 0.0
        self._number = 0
        self.cost = 0.0
        """The cost of all items together."""

    def __len__(self) -> int:
        return len(self._entries)

    def start_of(self, group: str) -> float:
        """The start tag that the next item of `group` would get."""
        return max(self._now, self._ends.get(group, 0.0))

    def cost_before(self, start: float) -> float:
        """The cost of the items that come before a new one with this start tag."""
        return sum(self._costs[: bisect_right(self._entries, start, key=_start)])

    def push(self, group: str, share: float, cost: float, item: T) -> Entry[T]:
        """Add an item; `share` and `cost` are positive."""
        start = self.start_of(group)
        self._ends[group] = start + cost / share
        self._number += 1
        entry = Entry(start, self._number, cost, item)
        place = bisect_right(self._entries, start, key=_start)
        self._entries.insert(place, entry)
        self._costs.insert(place, cost)
        self.cost += cost
        return entry

    def pop(self, fits: Callable[[T], bool] = lambda _: True) -> T | None:
        """Remove the first item that `fits` and return it; None if there is none."""
        for place, entry in enumerate(self._entries):
            if fits(entry.item):
                self._now = max(self._now, entry.start)
                self._remove(place)
                return entry.item
        return None

    def remove(self, entry: Entry[T]) -> None:
        """Remove an item that is still in the queue."""
        self._remove(bisect_left(self._entries, entry))

    def _remove(self, place: int) -> None:
        self._entries.pop(place).is_gone = True
        self.cost -= self._costs.pop(place)
        if not self._entries:  # all groups begin anew
            self._ends.clear()
            self._now = self.cost = 0.0


def _start(entry: Entry[T]) -> float:
    return entry.start

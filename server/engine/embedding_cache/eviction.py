"""Which entry a full cache gives up: S3-FIFO (Yang et al., "FIFO Queues are All You Need for Cache
Eviction", SOSP 2023).

New entries pass a small queue and reach the main one only if they are used on the way, so that a
scan of pictures that nobody asks about again does not empty the cache. A ghost queue remembers the
keys of what was given up, and lets those that come back straight into the main queue.
`benchmarks/eviction.py` has the hit rates beside those of other policies.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_SMALL_SHARE = 0.1
_MOST_USES = 3


class S3Fifo(Generic[K]):
    """Orders keys; who holds the entries counts their bytes and asks for victims."""

    def __init__(self) -> None:
        self._small: OrderedDict[K, int] = OrderedDict()
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghost: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def add(self, key: K) -> None:
        """Take in a key that is not there."""
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def hit(self, key: K) -> None:
        """Note a use of a key that is there."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(_MOST_USES, queue[key] + 1)

    def discard(self, key: K) -> None:
        """Forget a key, as if it had never been there."""
        self._small.pop(key, None)
        self._main.pop(key, None)

    def evict(self, may_go: Callable[[K], bool] = lambda _: True) -> K | None:
        """Take out the key to give up next; None if none of them may go."""
        kept = 0  # keys in a row that were moved on for not being allowed to go
        while kept < len(self):
            from_small = len(self._small) > _SMALL_SHARE * len(self) or not self._main
            queue = self._small if from_small else self._main
            key, uses = queue.popitem(last=False)
            if not may_go(key):
                self._main[key] = uses
                kept += 1
            elif not uses:
                if from_small:
                    self._remember(key)
                return key
            else:
                self._main[key] = 0 if from_small else uses - 1
                kept = 0
        return None

    def clear(self) -> None:
        for queue in (self._small, self._main, self._ghost):
            queue.clear()

    def _remember(self, key: K) -> None:
        self._ghost[key] = None
        while len(self._ghost) > max(1, len(self)):
            self._ghost.popitem(last=False)

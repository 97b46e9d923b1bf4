"""The entries of an arena: which there are, in what state, and which go when there is no room.

Entries go by S3-FIFO (Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023).
`benchmarks/eviction.py` has its hit rates beside those of other policies.
"""

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.engine.embedding_cache.arena import Arena, Extents, size_on_pages
from server.engine.embedding_cache.tier import Spec

K = TypeVar("K", bound=Hashable)

_SMALL_SHARE = 0.1
_MOST_USES = 3
HOST = "host"


class S3Fifo(Generic[K]):
    """Orders keys; the holder of the entries counts their bytes and asks for victims.

    New keys pass a small queue and reach the main one only if they are used on the way, so that a
    scan of pictures that are never asked for again does not empty the cache. A ghost queue
    remembers the keys of what was given up, and lets those that come back straight into the main
    queue.
    """

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


class State(enum.Enum):
    SOUGHT = enum.auto()  # threads look for it in the lower tiers
    ABSENT = enum.auto()  # no tier has it; its room is kept for what the encoder makes
    MADE = enum.auto()  # a worker is copying it into the arena
    READY = enum.auto()


@dataclass(eq=False, slots=True)
class Entry:
    """One image's embeddings, or the room for them. `pins` are uses that its room must outlive:
    reading it, writing it, filling it."""

    key: str
    spec: Spec
    extents: Extents
    state: State
    since: float
    pins: int = 0
    loaded_from: str = HOST


class Index:
    """Not safe for concurrent calls. An entry's room is given back when it is forgotten and has no
    pins, whichever comes last."""

    def __init__(self, arena: Arena, clock: Callable[[], float] = time.monotonic) -> None:
        self.arena = arena
        self.evictions = 0
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._order: S3Fifo[str] = S3Fifo()

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def holds(self, entry: Entry) -> bool:
        """Whether `entry` has not been forgotten."""
        return self._entries.get(entry.key) is entry

    def age_s(self, entry: Entry) -> float:
        """How long it has been in its state."""
        return self._clock() - entry.since

    def add(self, key: str, spec: Spec, state: State) -> Entry | None:
        """Room for a key that is not there, for which others may have to go; None if there is not
        enough. The room is not taken while the state is SOUGHT or MADE."""
        if size_on_pages(spec.nbytes) > self.arena.nbytes:
            return None
        while (extents := self.arena.allocate(spec.nbytes)) is None:
            victim = self._order.evict(lambda other: not self._entries[other].pins)
            if victim is None:
                return None
            if self._entries[victim].state is State.READY:
                self.evictions += 1
            self.forget(self._entries[victim])
        entry = self._entries[key] = Entry(key, spec, extents, state, self._clock())
        return entry

    def settle(self, entry: Entry, state: State) -> None:
        """End the search for an entry, or its making: it is READY or ABSENT, and may be evicted."""
        entry.state, entry.since = state, self._clock()
        self._order.add(entry.key)

    def make(self, entry: Entry) -> None:
        """Let the room of an ABSENT entry be filled."""
        entry.state = State.MADE
        self._order.discard(entry.key)

    def hit(self, entry: Entry) -> None:
        """Note a use of a READY entry."""
        if self.holds(entry):
            self._order.hit(entry.key)

    def forget(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._order.discard(entry.key)
        if not entry.pins:
            self.arena.free(entry.extents)

    def unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        if not entry.pins and not self.holds(entry):
            self.arena.free(entry.extents)

    def clear(self) -> None:
        for entry in list(self._entries.values()):
            self.forget(entry)
        self._order.clear()

    def size(self) -> dict[str, int]:
        """How many entries are READY, and their `bytes`."""
        ready = [e.spec.nbytes for e in self._entries.values() if e.state is State.READY]
        return {"entries": len(ready), "bytes": sum(ready), "max_bytes": self.arena.nbytes}

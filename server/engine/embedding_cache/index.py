"""The entries of an arena, their states, and their eviction.

Entries are evicted by S3-FIFO (Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP
2023). `benchmarks/eviction.py` compares its hit rates with those of other policies.
"""

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.engine.embedding_cache.arena import Arena, size_on_pages
from server.engine.embedding_cache.directory import Extents, Record
from server.engine.embedding_cache.tier import Spec

K = TypeVar("K", bound=Hashable)

_SMALL_SHARE = 0.1
_MOST_USES = 3
HOST = "host"


class S3Fifo(Generic[K]):
    """Chooses which key to evict; the owner counts bytes and asks for victims.

    New keys enter a small queue and reach the main queue only if they are used there, so a scan of
    pictures that are never used again does not empty the cache. A ghost queue remembers evicted
    keys, which enter the main queue directly if they return.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[K, int] = OrderedDict()
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghost: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def add(self, key: K) -> None:
        """Add a new key."""
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def hit(self, key: K) -> None:
        """Record a use of a key."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(_MOST_USES, queue[key] + 1)

    def discard(self, key: K) -> None:
        """Remove a key, without remembering it."""
        self._small.pop(key, None)
        self._main.pop(key, None)

    def evict(self, may_go: Callable[[K], bool] = lambda _: True) -> K | None:
        """Remove and return the key to evict next; None if no key may go."""
        kept = 0  # consecutive keys that may not go
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
    SOUGHT = enum.auto()  # threads look it up in the lower tiers
    ABSENT = enum.auto()  # no tier has it; its room is kept for the encoder's output
    MADE = enum.auto()  # a worker copies it into the arena
    READY = enum.auto()


@dataclass(eq=False, slots=True)
class Entry:
    """One image's embeddings, or the room for them. `pins` counts the reads and writes in progress,
    during which its room must not be freed."""

    key: str
    spec: Spec
    extents: Extents
    state: State
    since: float
    pins: int = 0
    loaded_from: str = HOST


class Index:
    """The entries of an arena by key. Calls must not be concurrent. An entry's room is freed when
    the entry was removed and has no pins. READY entries are in the arena's directory, if it has
    one; those that are there at the start are READY."""

    def __init__(self, arena: Arena, clock: Callable[[], float] = time.monotonic) -> None:
        self.arena = arena
        self.evictions = 0
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._order: S3Fifo[str] = S3Fifo()
        self._directory = arena.directory
        if self._directory is not None:
            self._adopt(list(self._directory.records()))

    def _adopt(self, records: list[Record]) -> None:
        """Take over what another process has left in the arena."""
        self.arena.occupy(record.extents for record in records)
        for key, spec, extents in records:
            self._entries[key] = Entry(key, spec, extents, State.READY, self._clock())
            self._order.add(key)

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def holds(self, entry: Entry) -> bool:
        """Whether `entry` is still in the index."""
        return self._entries.get(entry.key) is entry

    def age_s(self, entry: Entry) -> float:
        """The time since the entry's last change of state."""
        return self._clock() - entry.since

    def add(self, key: str, spec: Spec, state: State) -> Entry | None:
        """Add an entry for a new key, evicting others if needed; None if there is not enough room.
        The entry cannot be evicted while its state is SOUGHT or MADE."""
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
        """Set an entry to READY or ABSENT; it may be evicted from now on."""
        entry.state, entry.since = state, self._clock()
        self._order.add(entry.key)
        if state is State.READY and self._directory is not None:
            self._directory.note(Record(entry.key, entry.spec, entry.extents))

    def make(self, entry: Entry) -> None:
        """Set an ABSENT entry to MADE; it cannot be evicted until it is settled."""
        entry.state = State.MADE
        self._order.discard(entry.key)

    def hit(self, entry: Entry) -> None:
        """Record a use of a READY entry."""
        if self.holds(entry):
            self._order.hit(entry.key)

    def forget(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._order.discard(entry.key)
        if entry.state is State.READY and self._directory is not None:
            self._directory.drop(entry.extents)
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

    def leave_directory(self) -> None:
        """Change nothing more in the arena's directory."""
        self._directory = None

    def size(self) -> dict[str, int]:
        """The number of READY `entries` and their `bytes`, and the arena's `max_bytes`."""
        ready = [e.spec.nbytes for e in self._entries.values() if e.state is State.READY]
        return {"entries": len(ready), "bytes": sum(ready), "max_bytes": self.arena.nbytes}

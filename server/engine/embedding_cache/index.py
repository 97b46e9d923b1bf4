"""The entries of an arena: which there are, in what state, and which go when there is no room."""

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.embedding_cache.arena import Arena, Extents, size_on_pages
from server.engine.embedding_cache.entries import Spec
from server.engine.embedding_cache.eviction import S3Fifo

HOST = "host"


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
        enough. Nobody takes the room as long as the state is SOUGHT or MADE."""
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

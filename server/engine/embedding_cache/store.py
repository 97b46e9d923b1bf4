"""All tiers together: the entries in the arena, and threads that access the lower tiers.

Threads look up entries that are not in the arena in one lower tier after the other, and write new
entries to these tiers. Callers of `EmbeddingStore` wait for neither.
"""

import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blake3 import blake3

from server.engine.embedding_cache.arena import Arena, size_on_pages
from server.engine.embedding_cache.index import HOST, Entry, Index, State
from server.engine.embedding_cache.tier import Counts, DamagedEntry, Spec, Tier

log = logging.getLogger("saccade.embeddings")

READERS = 4
WRITERS = 2
# Entries that wait to be written may take at most this share of the arena.
_MOST_WAITING_SHARE = 0.5
# How long an entry counts as absent before the tiers are searched again.
_ABSENT_S = 5.0
_FLUSH_LIMIT_S = 10.0
_CLEAR_AGAIN_S = 1.0
_MESSAGE_INTERVAL_S = 30.0


class EmbeddingStore:
    """All tiers, as the scheduler uses them. Every call but `close` returns at once. Thread-safe.
    Keys are names of images; `Spec` is the tensor that an image must have."""

    def __init__(
        self,
        arena: Arena,
        tiers: Sequence[Tier] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tiers` are the lower tiers, fastest first."""
        self.arena = arena
        self.counts = Counts()
        self._opened = self._tiers = tuple(tiers)
        self._says = {tier: _Messages(tier.name) for tier in tiers}
        self._lock = threading.Lock()
        self._index = Index(arena, clock)
        self._clears: Counter[Tier] = Counter()  # how often each tier is still to be emptied
        self._waiting_bytes = 0
        self._writing = threading.Condition(self._lock)
        self._writes = 0
        self._readers = [ThreadPoolExecutor(READERS, f"embedding-{t.name}-read") for t in tiers]
        self._writers = [ThreadPoolExecutor(WRITERS, f"embedding-{t.name}-write") for t in tiers]

    # ------------------------------------------------------------------ looking for an entry

    def prefetch(self, key: str, spec: Spec) -> None:
        """Start to look up an entry that is needed soon."""
        with self._lock:
            self._seek(key, spec)

    def settled(self, key: str, spec: Spec) -> bool:
        """Whether the lookup of an entry is over: it is in the arena, or no tier has it. Starts the
        lookup if needed."""
        with self._lock:
            entry = self._seek(key, spec)
            return entry is None or entry.state is not State.SOUGHT

    def _seek(self, key: str, spec: Spec) -> Entry | None:
        entry = self._index.get(key)
        if entry is not None:
            if entry.state is not State.ABSENT or self._index.age_s(entry) < _ABSENT_S:
                return entry
            self._index.forget(entry)
        if not any(tier.breaker.may_try and tier not in self._clears for tier in self._tiers):
            return None
        entry = self._index.add(key, spec, State.SOUGHT)
        if entry is not None:
            self.counts.add("misses")
            self._readers[0].submit(self._look_in, 0, entry)
        return entry

    def _look_in(self, number: int, entry: Entry) -> None:
        """In a thread of tier `number`: read the entry, or continue with the next tier."""
        with self._lock:
            if not self._index.holds(entry):
                return  # it was removed, and its room is gone
            tier = self._tiers[number]
            is_readable = tier not in self._clears
            entry.pins += 1
        found = is_readable and self._read(tier, entry)
        with self._lock:
            if not self._index.holds(entry):
                pass
            elif found:
                entry.loaded_from = tier.name
                self._index.settle(entry, State.READY)
                for above in range(number):
                    self._write_behind(above, entry)
            elif number + 1 < len(self._tiers):
                self._readers[number + 1].submit(self._look_in, number + 1, entry)
            else:
                self._index.settle(entry, State.ABSENT)
            self._index.unpin(entry)

    def _read(self, tier: Tier, entry: Entry) -> bool:
        if not tier.breaker.allows():
            return False
        try:
            with tier.counts.timed("read"):
                views = self.arena.views(entry.extents)
                found = tier.read(stored_name(entry.key), entry.spec, views)
        except DamagedEntry as error:
            self._says[tier].damaged(error)
            tier.counts.add("errors")
            self._note_success(tier)
            found = False
        except Exception as error:
            self._note_failure(tier, error)
            found = False
        else:
            self._note_success(tier)
        tier.counts.add("hits" if found else "misses")
        return found

    # ------------------------------------------------------------------ using an entry

    def take(self, key: str, spec: Spec) -> Entry | None:
        """The entry, pinned until `release`, if it is in the arena; else None."""
        with self._lock:
            entry = self._index.get(key)
            if entry is None or entry.state is not State.READY or entry.spec != spec:
                return None
            entry.pins += 1
            return entry

    def used(self, entry: Entry) -> None:
        """Count a use of a taken entry."""
        with self._lock:
            if entry.loaded_from == HOST:
                self.counts.add("hits")
            entry.loaded_from = HOST
            self._index.hit(entry)

    def release(self, entry: Entry) -> None:
        with self._lock:
            self._index.unpin(entry)

    # ------------------------------------------------------------------ making an entry

    def reserve(self, key: str, spec: Spec) -> Entry | None:
        """Reserve room for an output of the encoder, to be followed by `commit` or `abandon`; None
        if the entry exists already or there is no room."""
        with self._lock:
            entry = self._index.get(key)
            if entry is None:
                self.counts.add("misses")
            elif entry.state is State.MADE or (entry.state is State.READY and entry.spec == spec):
                return None
            elif entry.state is State.ABSENT and entry.spec == spec:
                self._index.make(entry)
                entry.pins += 1
                return entry
            else:  # of another shape, or its lookup took too long
                self._index.forget(entry)
            entry = self._index.add(key, spec, State.MADE)
            if entry is not None:
                entry.pins += 1
            return entry

    def commit(self, entry: Entry) -> None:
        """Publish an entry whose reserved room was filled."""
        with self._lock:
            if self._index.holds(entry):
                self._index.settle(entry, State.READY)
                for number in range(len(self._tiers)):
                    self._write_behind(number, entry)
            self._index.unpin(entry)

    def abandon(self, entry: Entry) -> None:
        """Free reserved room that will not be filled."""
        with self._lock:
            if self._index.holds(entry):
                self._index.forget(entry)
            self._index.unpin(entry)

    def _write_behind(self, number: int, entry: Entry) -> None:
        tier = self._tiers[number]
        if not tier.breaker.may_try:
            return
        size = size_on_pages(entry.spec.nbytes)
        if self._waiting_bytes + size > _MOST_WAITING_SHARE * self.arena.nbytes:
            tier.counts.add("dropped")
            return
        self._waiting_bytes += size
        self._writes += 1
        entry.pins += 1
        self._writers[number].submit(self._write, tier, entry)

    def _write(self, tier: Tier, entry: Entry) -> None:
        name = stored_name(entry.key)
        try:
            if self._is_current(entry) and tier.breaker.allows():
                with tier.counts.timed("write"):
                    tier.write(name, entry.spec, self.arena.views(entry.extents))
                self._note_success(tier)
                if not self._is_current(entry):
                    tier.delete(name)  # the cache was cleared meanwhile
        except Exception as error:
            self._note_failure(tier, error)
        finally:
            with self._lock:
                self._waiting_bytes -= size_on_pages(entry.spec.nbytes)
                self._writes -= 1
                self._index.unpin(entry)
                self._writing.notify_all()

    def _is_current(self, entry: Entry) -> bool:
        with self._lock:
            return self._index.holds(entry)

    def _note_success(self, tier: Tier) -> None:
        if tier.breaker.succeeded():
            self._says[tier].works_again()

    def _note_failure(self, tier: Tier, error: Exception) -> None:
        tier.counts.add("errors")
        if tier.breaker.failed():
            self._says[tier].fails(error)

    # ------------------------------------------------------------------ the whole

    def clear(self) -> None:
        """Delete all entries, including those being read, made or written. Threads clear the lower
        tiers; nothing is read from a tier until it is done."""
        with self._lock:
            self._index.clear()
            for number, tier in enumerate(self._tiers):
                self._clears[tier] += 1
                self._writers[number].submit(self._clear, tier)

    def _clear(self, tier: Tier) -> None:
        """Clear a tier, and try again until that succeeds or the tiers are detached: deleted
        entries must not return with a tier that was unreachable for a while."""
        done = False
        if tier.breaker.allows():
            try:
                tier.clear()
                self._note_success(tier)
                done = True
            except Exception as error:
                self._note_failure(tier, error)
        with self._lock:
            if not done and tier in self._tiers:
                again = threading.Timer(_CLEAR_AGAIN_S, self._clear, [tier])
                again.daemon = True
                again.start()
                return
            self._clears[tier] -= 1
            self._clears += Counter()  # drops zeros
            self._writing.notify_all()

    def detach(self) -> None:
        """Delete all entries in memory, and stop using the lower tiers and the directory."""
        with self._lock:
            self._tiers = ()
            self._index.clear()
            self._index.leave_directory()

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Counts and sizes by tier."""
        with self._lock:
            host = self._index.size() | {"evictions": self._index.evictions}
        found: dict[str, dict[str, Any]] = {HOST: self.counts.snapshot() | host}
        for tier in self._tiers:
            found[tier.name] = tier.counts.snapshot() | tier.size()
        return found

    def close(self) -> None:
        """Wait up to `_FLUSH_LIMIT_S` for pending writes, and stop."""
        with self._writing:
            self._writing.wait_for(lambda: not (self._writes or self._clears), _FLUSH_LIMIT_S)
            self._index.leave_directory()  # the next process shall find the entries
        self.detach()
        for executor in itertools.chain(self._readers, self._writers):
            executor.shutdown(wait=False, cancel_futures=True)
        for tier in self._opened:
            tier.close()


class _Messages:
    """What the log says about one tier: at most one line of each kind in `_MESSAGE_INTERVAL_S`.

    Clients decide how often a tier is used, and one that works for some calls only would fail and
    recover every second.
    """

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._last: dict[str, float] = {}
        self._has_told = False

    def damaged(self, error: DamagedEntry) -> None:
        if self._may_say("damaged"):
            log.warning("ignoring a damaged entry in the %s tier: %s", self._tier, error)

    def fails(self, error: Exception) -> None:
        self._has_told = self._may_say("fails")
        if self._has_told:
            log.warning("the %s tier of the embedding cache is failing: %r", self._tier, error)

    def works_again(self) -> None:
        if self._has_told:
            log.warning("the %s tier of the embedding cache works again", self._tier)

    def _may_say(self, kind: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(kind, -math.inf) < _MESSAGE_INTERVAL_S:
            return False
        self._last[kind] = now
        return True


def stored_name(key: str) -> str:
    """The name of an entry in the lower tiers: a hash of its key, 64 hexadecimal digits."""
    return blake3(key.encode()).hexdigest()

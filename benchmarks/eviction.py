"""Hit rates of eviction policies on synthetic traces.

    python -m benchmarks.eviction [--output FILE]

Traces: independent draws from a Zipf law, for content that many users share; and chats, in which
each picture is requested several times within a short while and then never again, also mixed with a
scan (a batch job that shows every picture once). Sizes follow a log-normal law with a factor of e,
like images of mixed sizes. Caches hold a share of the bytes of all pictures in the trace.
"""

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks import environment
from server.engine.embedding_cache.index import S3Fifo

_PICTURES, _REQUESTS = 20_000, 200_000
_SHARES = (0.01, 0.05, 0.1, 0.25)
_TURNS, _AT_A_TIME = 8, 300
_NOBODY = -1


class Policy(Protocol):
    """Orders the entries of a cache; the cache counts the bytes."""

    def hit(self, key: int) -> None: ...
    def add(self, key: int) -> None: ...
    def evict(self) -> int | None: ...


class Lru:
    """Evicts the least recently used entry."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def hit(self, key: int) -> None:
        self._order.move_to_end(key)

    def add(self, key: int) -> None:
        self._order[key] = None

    def evict(self) -> int:
        return self._order.popitem(last=False)[0]


class Fifo(Lru):
    """Evicts the oldest entry."""

    def hit(self, key: int) -> None:
        pass


class Sieve:
    """Zhang et al., NSDI 2024: a hand moves through a queue, skips entries that were used since its
    last visit, and evicts the first other one."""

    def __init__(self) -> None:
        self._visited: dict[int, bool] = {}
        self._newer: dict[int, int] = {}
        self._newest = self._hand = _NOBODY

    def hit(self, key: int) -> None:
        self._visited[key] = True

    def add(self, key: int) -> None:
        self._visited[key] = False
        self._newer[self._newest] = key
        self._newest = key

    def evict(self) -> int:
        """The hand stays one entry behind the next candidate, so that this can be unlinked."""
        while True:
            key = self._newer.get(self._hand)
            if key is None:
                self._hand = _NOBODY
                continue
            if not self._visited[key]:
                break
            self._visited[key] = False
            self._hand = key
        del self._visited[key]
        following = self._newer.pop(key, None)
        if following is None:
            del self._newer[self._hand]
            self._newest = self._hand
        else:
            self._newer[self._hand] = following
        return key


_POLICIES = {"LRU": Lru, "FIFO": Fifo, "SIEVE": Sieve, "S3-FIFO": S3Fifo}


def hit_rate(policy: Policy, trace: np.ndarray, sizes: np.ndarray, capacity: float) -> float:
    """The share of requests of `trace` that find their picture in a cache of `capacity` bytes."""
    held: set[int] = set()
    used = hits = 0.0
    for key in trace.tolist():
        if key in held:
            hits += 1
            policy.hit(key)
            continue
        if sizes[key] > capacity:
            continue
        while used + sizes[key] > capacity:
            gone = policy.evict()
            assert gone is not None
            held.discard(gone)
            used -= sizes[gone]
        policy.add(key)
        held.add(key)
        used += sizes[key]
    return hits / len(trace)


def traces(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Each trace is an array of picture numbers below `_PICTURES`."""
    found = {}
    for exponent in (0.7, 0.9, 1.1):
        weights = np.arange(1, _PICTURES + 1) ** -exponent
        found[f"Zipf {exponent}"] = rng.choice(_PICTURES, _REQUESTS, p=weights / weights.sum())
    chats = found["chats"] = _chats(rng, _PICTURES)
    half = _chats(rng, _PICTURES // 2)
    scan = np.arange(_PICTURES // 2, _PICTURES)
    places = np.sort(rng.integers(0, len(half), len(scan)))
    found["chats and a scan"] = np.insert(half, places, scan)
    assert chats.max() < _PICTURES
    return found


def _chats(rng: np.random.Generator, pictures: int) -> np.ndarray:
    """`_AT_A_TIME` chats side by side, each of `_TURNS` turns about one picture, then the next."""
    trace, waiting = [], iter(range(pictures))
    running = [[next(waiting), 0] for _ in range(_AT_A_TIME)]
    while running:
        at = int(rng.integers(len(running)))
        chat = running[at]
        trace.append(chat[0])
        chat[1] += 1
        if chat[1] == _TURNS:
            following = next(waiting, None)
            if following is None:
                del running[at]
            else:
                running[at] = [following, 0]
    return np.array(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(0, 1, _PICTURES))
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, trace in traces(rng).items():
        print(f"{name:18}", *(f"{policy:>8}" for policy in _POLICIES))
        for share in _SHARES:
            capacity = share * sizes.sum()
            row = {
                policy: round(hit_rate(make(), trace, sizes, capacity), 3)
                for policy, make in _POLICIES.items()
            }
            rates.setdefault(name, {})[f"{share:.0%}"] = row
            print(f"{share:>18.0%}", *(f"{rate:8.3f}" for rate in row.values()), flush=True)
    if output is not None:
        result = {"what": "hit rates", **environment.describe(), "rates": rates}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Which replica gets a request: one whose caches have its picture, unless that one is too busy.

    key -> the first 8 replicas by rendezvous hash -> the first of these that is below the bound
        -> otherwise, and without a key: the less busy one of two random replicas

All routers rank the replicas of a key alike without knowing of each other, and when a replica comes
or goes, only its own keys move. Nothing here waits, sends, or reads a clock.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rule:
    """How far a replica may be busier than the mean.

    A replica is below the bound if it has fewer running requests than `bound` times the mean that
    one more request would make, or fewer than `floor`. `candidates` replicas of a key are tried.
    """

    bound: float = 1.25
    floor: int = 2
    candidates: int = 8

    def most(self, running: int, replicas: int) -> int | float:
        """How many requests a replica must have to be passed over, if `running` are on all."""
        if math.isinf(self.bound):
            return math.inf
        return max(self.floor, math.ceil(self.bound * (running + 1) / replicas))


class Replicas:
    """The replicas that are ready, by their names, which must be unique and stay the same."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._hashes = np.array([_hash(name) for name in names], dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.names)

    def ranked(self, key: str, count: int) -> list[int]:
        """The indices of the first `count` replicas for a key, best first."""
        scores = _scores(self._hashes, _hash(key))
        if count < len(scores):
            best = np.argpartition(scores, len(scores) - count)[-count:]
        else:
            best = np.arange(len(scores))
        order: list[int] = best[np.argsort(scores[best])[::-1]].tolist()
        return order


def choose(
    key: str | None, replicas: Replicas, running: NDArray[np.int64], rule: Rule, random: Random
) -> int:
    """The index of the replica for a request.

    `running` has the number of requests that each replica has, of shape (replicas,). Raises
    ValueError if there is no replica.
    """
    if not len(replicas):
        raise ValueError("there is no replica")
    if key is not None:
        most = rule.most(int(running.sum()), len(replicas))
        for index in replicas.ranked(key, rule.candidates):
            if running[index] < most:
                return index
    return less_busy(running, random)


def less_busy(running: NDArray[np.int64], random: Random) -> int:
    """Of two random replicas, the one with fewer requests."""
    one = random.randrange(len(running))
    other = (one + random.randrange(1, len(running))) % len(running) if len(running) > 1 else one
    return one if running[one] <= running[other] else other


def _hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _scores(hashes: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A score of each replica for the key: the mixer of SplitMix64 (Steele, Lea and Flood, 2014),
    which spreads each bit of the difference over all 64."""
    mixed = hashes ^ np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

"""A model of many replicas behind a router, which decides by the server's own code.

A replica works on one request at a time, in the order in which they came, and for a shorter time if
it has the request's picture, in a cache that evicts like the server's host tier. Real replicas work
on many requests at once. Arrivals do not depend on answers, but for requests that a killed replica
has: they are sent again.
"""

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

from server.engine.embedding_cache.index import S3Fifo
from server.scale.routing import Replicas, Rule, choose, less_busy

PICTURES, CACHED, ALPHA = 400, 100, 0.9  # pictures and entries of the cache, for each replica
HIT_S, MISS_S, LOAD = 0.25, 1.0, 0.6
# Of the work with the hit rate that `LOAD` refers to.
_HIT_RATE = 0.55
_TURNS, _THINKING_S, _POPULAR = 5, 20.0, 0.2

# When a request comes, in seconds, and its picture.
Request = tuple[float, str]


def mean_work_s(hit_rate: float = _HIT_RATE) -> float:
    return hit_rate * HIT_S + (1 - hit_rate) * MISS_S


def zipf_trace(
    replicas: int, each: int, rate: float, *, seed: int = 1, pictures: int = PICTURES
) -> list[Request]:
    """Independent requests about pictures whose popularity follows Zipf's law: `each` for each
    replica, `rate` of all in a second."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, replicas * each))
    chosen = random.choice(
        replicas * pictures, replicas * each, p=popularity(replicas * pictures, ALPHA)
    )
    return [(time, f"picture {n}") for time, n in zip(times.tolist(), chosen.tolist(), strict=True)]


def popularity(pictures: int, alpha: float) -> NDArray[np.float64]:
    """The share of each picture in the requests, the most popular one first."""
    weights: NDArray[np.float64] = 1 / np.arange(1, pictures + 1) ** alpha
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def session_trace(replicas: int, each: int, rate: float, *, seed: int = 1) -> list[Request]:
    """Conversations of several turns about a picture; a fifth are about one that is popular."""
    random = np.random.default_rng(seed)
    popular = popularity(replicas * PICTURES, ALPHA)
    count = replicas * each // _TURNS
    starts = np.cumsum(random.exponential(_TURNS / rate, count)).tolist()
    shared = random.choice(len(popular), count, p=popular).tolist()
    found: list[Request] = []
    for n, start in enumerate(starts):
        is_popular = random.random() < _POPULAR
        picture = f"picture {shared[n]}" if is_popular else f"own {n}"
        turns = int(random.geometric(1 / _TURNS))
        thinking = np.cumsum(random.exponential(_THINKING_S, turns)).tolist()
        found += [(start + after, picture) for after in (0.0, *thinking[:-1])]
    return sorted(turn for turn in found if turn[0] <= starts[-1])


# ---------------------------------------------------------------------- policies

# The index of the replica for a picture.
Choose = Callable[[str, "State"], int]


@dataclass
class State:
    """What a router knows: the replicas that are ready, and their running requests."""

    replicas: Replicas
    running: NDArray[np.int64]
    random: Random
    turn: int = 0


def round_robin(_: str, state: State) -> int:
    state.turn += 1
    return state.turn % len(state.replicas)


def power_of_two(_: str, state: State) -> int:
    return less_busy(state.running, state.random)


def by_rule(rule: Rule) -> Choose:
    def chosen(picture: str, state: State) -> int:
        return choose(picture, state.replicas, state.running, rule, state.random)

    return chosen


POLICIES: Mapping[str, Choose] = {
    "round robin": round_robin,
    "power of two": power_of_two,
    "hash": by_rule(Rule(bound=math.inf, candidates=1)),
    "bounded hash": by_rule(Rule()),
}


# ---------------------------------------------------------------------- replicas


class Cache:
    """The pictures that a replica has."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._has: set[str] = set()
        self._order: S3Fifo[str] = S3Fifo()

    def ask(self, picture: str) -> bool:
        """Whether it has the picture; it does afterwards."""
        if picture in self._has:
            self._order.hit(picture)
            return True
        if len(self._has) >= self._entries and (victim := self._order.evict()) is not None:
            self._has.remove(victim)
        self._has.add(picture)
        self._order.add(picture)
        return False


@dataclass
class Replica:
    name: str
    cache: Cache
    speed: float = 1.0
    free_at_s: float = 0.0
    served: int = 0
    # Ongoing requests by number: (came at, picture).
    ongoing: dict[int, Request] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """An answered request."""

    came_s: float
    took_s: float
    work_s: float
    was_hit: bool
    replica: str
    attempts: int


class Fleet:
    """Replicas behind a router."""

    def __init__(
        self,
        speeds: Sequence[float],
        policy: Choose,
        *,
        entries: int = CACHED,
        hit_s: float = HIT_S,
        miss_s: float = MISS_S,
        seed: int = 1,
    ) -> None:
        self._policy, self._entries = policy, entries
        self._hit_s, self._miss_s = hit_s, miss_s
        self._random = Random(seed)
        self._replicas: list[Replica] = []
        self._finishing: list[tuple[float, int, Replica, float, bool, int]] = []
        self._count = 0
        for n, speed in enumerate(speeds):
            self.add(f"replica-{n}", speed)

    def add(self, name: str, speed: float = 1.0, now_s: float = 0.0) -> None:
        """A replica without any pictures."""
        added = Replica(name, Cache(self._entries), speed, free_at_s=now_s)
        self._are([*self._replicas, added])

    def kill(self, name: str) -> list[Request]:
        """A replica ends at once; returns its ongoing requests."""
        (killed,) = [each for each in self._replicas if each.name == name]
        self._are([each for each in self._replicas if each is not killed])
        lost = list(killed.ongoing.values())
        killed.ongoing.clear()
        return lost

    def _are(self, replicas: list[Replica]) -> None:
        self._replicas = replicas
        running = np.array([len(each.ongoing) for each in replicas], np.int64)
        self._state = State(Replicas([each.name for each in replicas]), running, self._random)
        self._places = {each.name: n for n, each in enumerate(replicas)}

    def ask(self, picture: str, came_s: float, now_s: float, attempts: int = 1) -> None:
        """A request comes to the router, now."""
        place = self._policy(picture, self._state)
        replica = self._replicas[place]
        was_hit = replica.cache.ask(picture)
        work_s = (self._hit_s if was_hit else self._miss_s) / replica.speed
        replica.free_at_s = max(now_s, replica.free_at_s) + work_s
        self._count += 1
        replica.ongoing[self._count] = (came_s, picture)
        self._state.running[place] += 1
        ends = (replica.free_at_s, self._count, replica, work_s, was_hit, attempts)
        heapq.heappush(self._finishing, ends)

    def done(self, until_s: float) -> Iterator[Done]:
        """Requests that end until then."""
        while self._finishing and self._finishing[0][0] <= until_s:
            at_s, number, replica, work_s, was_hit, attempts = heapq.heappop(self._finishing)
            if number not in replica.ongoing:
                continue  # its replica was killed
            came_s, _ = replica.ongoing.pop(number)
            replica.served += 1
            self._state.running[self._places[replica.name]] -= 1
            yield Done(came_s, at_s - came_s, work_s, was_hit, replica.name, attempts)


# Something that happens at a time, in seconds, to the fleet; returns requests to be sent again.
Event = tuple[float, Callable[[Fleet], Iterable[Request]]]


def run(fleet: Fleet, trace: Sequence[Request], events: Sequence[Event] = ()) -> list[Done]:
    """All answers to a trace of requests."""
    done: list[Done] = []
    waiting = sorted(events, key=lambda event: event[0], reverse=True)
    for at_s, picture in trace:
        while waiting and waiting[-1][0] <= at_s:
            when_s, happens = waiting.pop()
            done += fleet.done(when_s)
            for came_s, again in happens(fleet):
                fleet.ask(again, came_s, when_s, attempts=2)
        done += fleet.done(at_s)
        fleet.ask(picture, at_s, at_s)
    return [*done, *fleet.done(math.inf)]


def run_closed(fleet: Fleet, pictures: Sequence[str], clients: int) -> list[Done]:
    """All answers if each client asks about the next picture when its last request is answered."""
    done: list[Done] = []
    left = iter(pictures)
    for picture in itertools.islice(left, clients):
        fleet.ask(picture, 0.0, 0.0)
    while (answer := next(fleet.done(math.inf), None)) is not None:
        done.append(answer)
        if picture := next(left, ""):
            now_s = answer.came_s + answer.took_s
            fleet.ask(picture, now_s, now_s)
    return done


def summary(done: Sequence[Done], replicas: int, *, since_s: float = 0.0) -> dict[str, float]:
    """Of the answers to requests that came since then, by default of all: the hit rate, the
    requests and the work of the replica with most of them, and how long they took."""
    counted = [each for each in done if each.came_s >= since_s]
    requests: Counter[str] = Counter()
    work: dict[str, float] = defaultdict(float)
    for each in counted:
        requests[each.replica] += 1
        work[each.replica] += each.work_s
    p50, p99 = np.percentile([each.took_s for each in counted], (50, 99))
    return {
        "hit_rate": round(sum(each.was_hit for each in counted) / len(counted), 4),
        "hottest_over_mean": round(max(requests.values()) * replicas / len(counted), 3),
        "busiest_over_mean": round(max(work.values()) * replicas / sum(work.values()), 3),
        "p50_s": round(float(p50), 3),
        "p99_s": round(float(p99), 3),
    }

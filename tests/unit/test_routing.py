"""Which replica gets a request."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest

from benchmarks import fleet_model
from server.scale.routing import Replicas, Rule, choose, less_busy

KEYS = [f"picture {n}" for n in range(4000)]


def fleet(count: int) -> Replicas:
    return Replicas([f"replica-{n}" for n in range(count)])


def owners(replicas: Replicas) -> list[str]:
    return [replicas.names[replicas.ranked(key, 1)[0]] for key in KEYS]


@pytest.mark.parametrize(
    ("running", "replicas", "rule", "most"),
    [
        (0, 2, Rule(floor=1), 1),
        (3, 2, Rule(floor=1), 3),  # 1.25 * 4 / 2
        (15, 2, Rule(), 10),
        (7, 8, Rule(), 2),
        (7, 8, Rule(floor=4), 4),
        (799, 8, Rule(), 125),
        (799, 8, Rule(bound=1.5), 150),
        (799, 8, Rule(bound=math.inf), math.inf),
    ],
)
def test_the_bound(running: int, replicas: int, rule: Rule, most: float) -> None:
    assert rule.most(running, replicas) == most


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ([0, 0, 0, 0], 0),
        ([4, 4, 4, 4], 0),  # all are equally busy
        ([5, 3, 4, 4], 0),  # the bound is 1.25 * 17 / 4, rounded up: 6
        ([6, 3, 4, 4], 1),
        ([6, 6, 2, 2], 2),
    ],
)
def test_a_busy_replica_is_passed_over(counts: list[int], chosen: int) -> None:
    """`counts` are the requests of the replicas in the order of their rank for the key."""
    replicas = fleet(4)
    order = replicas.ranked("a", 4)
    running = np.zeros(4, np.int64)
    running[order] = counts
    assert order.index(choose("a", replicas, running, Rule(), Random(0))) == chosen


def test_replicas_beyond_the_candidates_are_chosen_by_load() -> None:
    replicas, rule = fleet(10), Rule(candidates=1)
    (first,) = replicas.ranked("a", 1)
    running = np.full(10, 10, np.int64)
    running[first] = 100
    found = {choose("a", replicas, running, rule, Random(seed)) for seed in range(200)}
    assert found == set(range(10)) - {first}


def test_the_less_busy_of_two_is_chosen() -> None:
    running = np.array([3, 1, 2], np.int64)
    found = Counter(less_busy(running, Random(seed)) for seed in range(300))
    assert set(found) == {1, 2}  # the busiest never
    assert found[1] > found[2]
    assert less_busy(np.array([9], np.int64), Random(0)) == 0


def test_requests_without_a_key_go_anywhere() -> None:
    running = np.zeros(3, np.int64)
    found = {choose(None, fleet(3), running, Rule(), Random(seed)) for seed in range(50)}
    assert found == {0, 1, 2}


def test_without_replicas_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="no replica"):
        choose("a", fleet(0), np.zeros(0, np.int64), Rule(), Random(0))


def test_routers_agree_whatever_the_order_of_their_replicas() -> None:
    names = [f"replica-{n}" for n in range(20)]
    one, other = Replicas(names), Replicas(names[::-1])
    for key in KEYS[:50]:
        assert [one.names[n] for n in one.ranked(key, 8)] == [
            other.names[n] for n in other.ranked(key, 8)
        ]


@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_each_replica_has_its_share_of_the_keys(count: int) -> None:
    shares = Counter(owners(fleet(count)))
    assert len(shares) == count
    # Four standard deviations of a binomial distribution.
    mean = len(KEYS) / count
    assert max(abs(share - mean) for share in shares.values()) < 4 * math.sqrt(mean)


@pytest.mark.parametrize("count", [1, 2, 9, 99])
def test_only_the_keys_of_a_new_replica_move(count: int) -> None:
    before, after = owners(fleet(count)), owners(fleet(count + 1))
    moved = [to for was, to in zip(before, after, strict=True) if was != to]
    assert set(moved) == {f"replica-{count}"}
    assert len(moved) / len(KEYS) == pytest.approx(1 / (count + 1), rel=0.5)


# ---------------------------------------------------------------------- in the simulation


def half_hot(replicas: int) -> list[fleet_model.Request]:
    """Half of the requests are about one picture."""
    rate = fleet_model.LOAD * replicas / fleet_model.mean_work_s()
    trace = fleet_model.zipf_trace(replicas, 100, rate)
    return [(at_s, "hot" if n % 2 else picture) for n, (at_s, picture) in enumerate(trace)]


def p99_s(policy: str, replicas: int) -> float:
    fleet = fleet_model.Fleet([1.0] * replicas, fleet_model.POLICIES[policy])
    return fleet_model.summary(fleet_model.run(fleet, half_hot(replicas)), replicas)["p99_s"]


@pytest.mark.parametrize("replicas", [10, 30])
def test_a_popular_picture_overloads_no_replica(replicas: int) -> None:
    by_load = p99_s("power of two", replicas)
    assert p99_s("bounded hash", replicas) < 1.5 * by_load
    assert p99_s("hash", replicas) > 5 * by_load


def test_every_request_is_answered_though_a_replica_is_killed() -> None:
    trace = half_hot(3)
    killed_s, back_s = trace[100][0], trace[200][0]

    def back(fleet: fleet_model.Fleet) -> list[fleet_model.Request]:
        fleet.add("replica-0", now_s=back_s)
        return []

    events = ((killed_s, lambda fleet: fleet.kill("replica-0")), (back_s, back))
    fleet = fleet_model.Fleet([1.0] * 3, fleet_model.POLICIES["bounded hash"])
    done = fleet_model.run(fleet, trace, events)
    assert sorted(each.came_s for each in done) == [at_s for at_s, _ in trace]
    meanwhile = [
        each.replica
        for each in done
        if killed_s < each.came_s and each.came_s + each.took_s < back_s
    ]
    assert set(meanwhile) == {"replica-1", "replica-2"}
    assert "replica-0" in {each.replica for each in done if each.came_s > back_s}

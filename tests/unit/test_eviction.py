"""The order in which a full cache evicts its entries."""

from hypothesis import given
from hypothesis import strategies as st

from server.engine.embedding_cache.index import S3Fifo


def filled(*keys: int) -> S3Fifo[int]:
    order: S3Fifo[int] = S3Fifo()
    for key in keys:
        order.add(key)
    return order


def test_new_keys_are_evicted_in_insertion_order() -> None:
    order = filled(1, 2, 3)
    assert [order.evict() for _ in range(4)] == [1, 2, 3, None]


def test_a_used_key_outlives_unused_keys() -> None:
    order = filled(1, 2, 3)
    order.hit(1)
    assert [order.evict() for _ in range(3)] == [2, 3, 1]


def test_a_scan_does_not_empty_the_cache() -> None:
    """Keys for ten times the cache's capacity pass, each requested once."""
    order, wanted, kept = filled(*range(50)), set(range(50)), set(range(50))
    for key in wanted:
        order.hit(key)
    for key in range(1000, 2000):
        order.add(key)
        kept.add(key)
        if len(kept) > 100:
            victim = order.evict()
            assert victim is not None
            kept.remove(victim)
    assert wanted <= kept


def test_a_key_added_again_after_eviction_joins_the_main_queue() -> None:
    order = filled(1, 2, 3)
    assert order.evict() == 1
    order.add(1)
    order.add(4)
    assert [order.evict() for _ in range(3)] == [2, 3, 4], "1 went to the main queue"


def test_a_key_that_may_not_be_evicted_stays() -> None:
    order = filled(1, 2, 3)
    assert order.evict(lambda key: key == 3) == 3
    assert order.evict(lambda key: False) is None
    assert len(order) == 2
    assert {order.evict(), order.evict()} == {1, 2}


def test_a_used_key_is_evicted_if_no_other_key_may_be() -> None:
    order = filled(1, 2)
    for _ in range(5):
        order.hit(2)
    assert order.evict(lambda key: key == 2) == 2


def test_a_discarded_key_is_never_evicted() -> None:
    order = filled(1, 2)
    order.discard(1)
    order.discard(7)
    assert [order.evict(), order.evict()] == [2, None]
    order.add(1)
    order.clear()
    assert (order.evict(), len(order)) == (None, 0)


def test_the_number_of_remembered_keys_is_bounded() -> None:
    order = filled(*range(10))
    for key in range(10, 10_000):
        order.evict()
        order.add(key)
    assert len(order._ghost) <= 11


@given(
    st.lists(st.tuples(st.sampled_from(["add", "hit", "discard", "evict"]), st.integers(0, 12))),
    st.sets(st.integers(0, 12)),
)
def test_the_cache_contains_the_keys_added_and_not_removed(
    steps: list[tuple[str, int]], pinned: set[int]
) -> None:
    order: S3Fifo[int] = S3Fifo()
    held: set[int] = set()
    for what, key in steps:
        if what == "add" and key not in held:
            order.add(key)
            held.add(key)
        elif what == "hit" and key in held:
            order.hit(key)
        elif what == "discard":
            order.discard(key)
            held.discard(key)
        elif what == "evict":
            victim = order.evict(lambda key: key not in pinned)
            assert (victim is None) == (held <= pinned)
            if victim is not None:
                assert victim not in pinned
                held.remove(victim)
        assert len(order) == len(held)
    assert {order.evict() for _ in held} == held

"""The queue of requests that wait: its order among groups."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.request.fair_queue import Entry, FairQueue


def order(queue: FairQueue[str]) -> list[str | None]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_group_is_served_in_the_order_of_arrival() -> None:
    queue = FairQueue[str]()
    for item in "abcd":
        queue.push("group", 1.0, 1.0, item)
    assert order(queue) == list("abcd")


def test_a_long_queue_of_one_group_does_not_delay_the_first_item_of_another() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.push("heavy", 1.0, 1.0, "heavy")
    for _ in range(10):
        queue.pop()
    queue.push("light", 1.0, 1.0, "light")
    assert "light" in [queue.pop(), queue.pop()]


def test_groups_that_wait_get_work_by_their_shares() -> None:
    queue = FairQueue[str]()
    for _ in range(300):
        queue.push("one", 1.0, 1.0, "one")
        queue.push("three", 3.0, 1.0, "three")
    assert Counter(queue.pop() for _ in range(200)) == {"one": 50, "three": 150}


def test_costly_items_count_for_more() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.push("pictures", 1.0, 4.0, "pictures")
        queue.push("texts", 1.0, 1.0, "texts")
    assert Counter(queue.pop() for _ in range(100)) == {"pictures": 20, "texts": 80}


def test_a_group_that_was_idle_gets_no_credit_for_it() -> None:
    queue = FairQueue[str]()
    for _ in range(50):
        queue.push("busy", 1.0, 1.0, "busy")
    for _ in range(40):
        queue.pop()
    for _ in range(50):
        queue.push("late", 1.0, 1.0, "late")
    assert Counter(queue.pop() for _ in range(20)) == {"busy": 10, "late": 10}


def test_removed_items_are_not_served_and_cost_nothing() -> None:
    queue = FairQueue[str]()
    entries = [queue.push("group", 1.0, 2.0, str(number)) for number in range(6)]
    for entry in entries[:5]:
        queue.remove(entry)
    assert (len(queue), queue.cost) == (1, 2.0)
    assert queue.cost_before(100.0) == 2.0
    assert order(queue) == ["5"]
    assert queue.pop() is None


def test_items_that_do_not_fit_keep_their_turn() -> None:
    queue = FairQueue[str]()
    for group in ("a", "b"):
        for number in range(3):
            queue.push(group, 1.0, 1.0, f"{group}{number}")
    assert [queue.pop(lambda item: item[0] == "b") for _ in range(4)] == ["b0", "b1", "b2", None]
    queue.push("c", 1.0, 1.0, "c0")
    assert order(queue) == ["a0", "a1", "a2", "c0"]


def test_the_cost_before_a_new_item_depends_on_its_group() -> None:
    queue = FairQueue[str]()
    for _ in range(10):
        queue.push("heavy", 1.0, 1.0, "heavy")
    assert queue.cost_before(queue.start_of("heavy")) == 10
    assert queue.cost_before(queue.start_of("light")) == 1


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abc"), st.integers(1, 9)),
        st.tuples(st.just("pop"), st.just(""), st.just(0)),
        st.tuples(st.just("remove"), st.just(""), st.integers(0, 99)),
    ),
    max_size=60,
)
_SHARES = {"a": 1.0, "b": 2.0, "c": 0.5}


@given(_STEPS)
def test_order_and_costs_are_those_of_the_definition(steps: list[tuple[str, str, int]]) -> None:
    queue, waiting = FairQueue[int](), list[Entry[int]]()
    for number, (step, group, value) in enumerate(steps):
        if step == "push":
            waiting.append(queue.push(group, _SHARES[group], float(value), number))
        elif waiting and step == "pop":
            first = min(waiting, key=lambda entry: (entry.start, entry.number))
            assert queue.pop() == first.item
            waiting.remove(first)
        elif waiting:
            queue.remove(waiting.pop(value % len(waiting)))
        assert (len(queue), queue.cost) == (len(waiting), sum(entry.cost for entry in waiting))
        for group in _SHARES:
            start = queue.start_of(group)
            before = sum(entry.cost for entry in waiting if entry.start <= start)
            assert queue.cost_before(start) == before

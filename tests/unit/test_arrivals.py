"""Bodies that arrive count as requests that wait, for some time."""

from contextlib import ExitStack

from server.request.arrivals import Arrivals


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_body_counts_for_its_group_until_it_is_complete() -> None:
    arrivals = Arrivals(5)
    with arrivals.one("a"):
        with arrivals.one("a"), arrivals.one("b"):
            assert (arrivals.count("a"), arrivals.count("b")) == (2, 1)
        assert (arrivals.count("a"), arrivals.count("b")) == (1, 0)
    assert arrivals.count("a") == 0


def test_a_slow_body_counts_for_some_time_only() -> None:
    clock = Clock()
    arrivals = Arrivals(5, clock)
    with ExitStack() as slow:
        for _ in range(600):
            slow.enter_context(arrivals.one(""))
        clock.now = 4.9
        with arrivals.one(""):
            assert arrivals.count("") == 601
            clock.now = 5
            assert arrivals.count("") == 1
        assert arrivals.count("") == 0
    assert arrivals.count("") == 0


def test_complete_bodies_are_forgotten_behind_a_slow_one() -> None:
    clock = Clock()
    arrivals = Arrivals(5, clock)
    with arrivals.one("slow"):
        for _ in range(3):
            with arrivals.one("fast"):
                pass
        assert (arrivals.count("slow"), arrivals.count("fast")) == (1, 0)
        clock.now = 6
        assert (arrivals.count("slow"), arrivals.count("fast")) == (0, 0)

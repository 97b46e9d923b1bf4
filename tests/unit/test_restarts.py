"""How often a dead engine is started again, and what new requests are told meanwhile."""

import asyncio

import pytest

from server.engine.restarts import Restarts

MOST, WITHIN_S, START_S = 3, 600.0, 20.0


class Engine:
    """Dies when it is told to, and takes some time to start, or fails to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.is_dead = False
        self.failures = 0
        self.told: list[int | None] = []
        self.restarts = Restarts(lambda: self.is_dead, self.start, MOST, WITHIN_S, lambda: self.now)

    async def start(self) -> None:
        for _ in range(4):
            refusal = self.restarts.refusal()
            assert refusal is not None
            self.told.append(refusal.retry_after_s)
            self.now += START_S / 4
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is lost")
        self.is_dead = False

    def dies(self) -> bool:
        """Whether it runs again."""
        self.is_dead = True
        assert self.restarts.under_way
        return asyncio.run(self.restarts.again())


def test_a_client_is_told_to_wait_as_long_as_the_last_restart_took() -> None:
    engine = Engine()
    assert engine.restarts.refusal() is None
    assert engine.dies()
    assert engine.told == [30, 25, 20, 15], "nothing was measured yet"
    assert engine.restarts.refusal() is None
    engine.told.clear()
    engine.now += 100
    engine.is_dead = True
    refusal = engine.restarts.refusal()
    assert refusal is not None
    assert refusal.retry_after_s == 20, "nobody has noticed yet that it died"
    assert engine.dies()
    assert engine.told == [20, 15, 10, 5]


def test_an_engine_that_dies_too_often_is_given_up() -> None:
    engine = Engine()
    assert [engine.dies() for _ in range(MOST)] == [True] * MOST
    assert not engine.dies()
    assert engine.restarts.given_up
    assert not engine.restarts.under_way
    assert engine.restarts.refusal() is None


def test_old_restarts_do_not_count() -> None:
    engine = Engine()
    for _ in range(3 * MOST):
        engine.now += WITHIN_S / MOST
        assert engine.dies()


@pytest.mark.parametrize(("failures", "runs"), [(MOST - 1, True), (MOST, False)])
def test_a_start_that_fails_is_tried_again_and_counts(failures: int, runs: bool) -> None:
    engine = Engine()
    engine.failures = failures
    assert engine.dies() is runs
    assert engine.restarts.given_up is not runs

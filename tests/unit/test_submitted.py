"""Work in a thread of an executor, and what becomes of its result."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.concurrency import submitted


def test_results_and_errors_reach_the_caller() -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            assert await submitted(executor, max, 1, 2) == 2
            with pytest.raises(ZeroDivisionError):
                await submitted(executor, divmod, 1, 0)

    asyncio.run(main())


def test_an_error_does_not_keep_what_the_work_was_given() -> None:
    """Otherwise the bodies of refused requests stay in memory until Python looks for cycles."""

    class Payload(bytearray):
        pass

    def refuse(_: Payload) -> None:
        raise ValueError

    async def main() -> "weakref.ref[Payload]":
        payload = Payload(1)
        with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError):
            await submitted(executor, refuse, payload)
        return weakref.ref(payload)

    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_work_that_is_cancelled_before_its_turn_is_not_done() -> None:
    done = []

    async def main() -> None:
        occupied = threading.Event()
        with ThreadPoolExecutor(1) as executor:
            first = submitted(executor, occupied.wait, 10)
            cancelled, last = (submitted(executor, done.append, name) for name in ("a", "b"))
            cancelled.cancel()
            occupied.set()
            await last
            assert await first

    asyncio.run(main())
    assert done == ["b"]


def test_work_may_outlive_the_event_loop() -> None:
    released, ended = threading.Event(), threading.Event()

    def work() -> None:
        released.wait(10)

    with ThreadPoolExecutor(1) as executor:

        async def main() -> None:
            submitted(executor, work)

        asyncio.run(main())
        executor.submit(ended.set)
        released.set()
        assert ended.wait(10)  # the thread goes on

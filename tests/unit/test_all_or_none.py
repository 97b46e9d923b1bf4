"""Tasks of one request that fail together."""

import asyncio

import pytest

from server.concurrency import all_or_none


async def fail() -> None:
    await asyncio.sleep(0)
    raise ValueError


async def wait() -> None:
    await asyncio.sleep(60)


def test_a_task_whose_parts_fail_is_not_taken_for_a_cancelled_one() -> None:
    """Who finds it cancelled answers as if the client had left."""

    async def run() -> int:
        with pytest.raises(ValueError):
            await all_or_none([wait(), fail()])
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert asyncio.run(run()) == 0


def test_a_task_that_is_cancelled_stays_so() -> None:
    async def run() -> int:
        task = asyncio.create_task(all_or_none([wait(), wait()]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelling()

    assert asyncio.run(run()) == 1

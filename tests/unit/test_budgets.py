"""Budgets: what running requests hold of memory and of image tokens."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.errors import ImageTokensFull, MediaMemoryFull, ServerBusy
from server.request.admission import Admission
from server.request.budgets import Budgets, Holdings, Item, Resource
from server.telemetry.record import Record
from tests.admission import UNLIMITED, limits

ROOM_S = 1000.0


def budgets(media: int = 100, tokens: int = 100, wait_s: float = ROOM_S) -> Budgets:
    return Budgets({Resource.MEDIA: media, Resource.IMAGE_TOKENS: tokens}, wait_s)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def running(work: Awaitable[Any]) -> asyncio.Task[Any]:
    return asyncio.ensure_future(work)  # type: ignore[return-value]


def on_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(run())


def test_a_request_waits_until_others_have_made_room() -> None:
    async def test() -> None:
        shared = budgets()
        first, second = Holdings(shared), Holdings(shared)
        await first.take(Item.FILES, 80)
        waiting = running(second.take(Item.FEATURES, 30))
        await settle()
        assert not waiting.done()
        first.note(Item.FILES, -10)
        await waiting
        assert shared.held[Resource.MEDIA] == 100
        first.close()
        second.close()
        assert shared.held[Resource.MEDIA] == 0

    on_loop(test)


def test_requests_that_wait_for_one_another_all_end() -> None:
    """Each holds a part of what it needs, and together they hold everything."""

    async def test() -> None:
        shared, most = budgets(), 0

        async def work() -> None:
            nonlocal most
            holdings = Holdings(shared)
            for item in (Item.FILES, Item.IMAGE_TOKENS, Item.FEATURES):
                await holdings.take(item, 20)
                most = max(most, *shared.held.values())
                await asyncio.sleep(0)
            holdings.close()

        await asyncio.gather(*(work() for _ in range(50)))
        assert list(shared.held.values()) == [0, 0]
        assert 100 <= most <= 100 + 40  # the needs of one request above the total

    on_loop(test)


def test_a_request_that_needs_more_than_the_total_is_served_alone() -> None:
    async def test() -> None:
        shared = budgets()
        other, large = Holdings(shared), Holdings(shared)
        await other.take(Item.FILES, 1)
        waiting = running(large.take(Item.FILES, 500))
        await settle()
        assert not waiting.done()
        other.close()
        await waiting
        large.close()
        assert shared.held[Resource.MEDIA] == 0

    on_loop(test)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (Item.FILES, MediaMemoryFull, "90 bytes of images and clips, the limit is 100"),
        (Item.IMAGE_TOKENS, ImageTokensFull, "90 image tokens, the limit is 100"),
    ],
)
def test_the_refusal_names_the_bound(item: Item, error: type[ServerBusy], message: str) -> None:
    async def test() -> None:
        shared = budgets(wait_s=0.01)
        first = Holdings(shared)
        await first.take(item, 90)
        with pytest.raises(error, match=message):
            await Holdings(shared).take(item, 20)
        assert not shared.is_short

    on_loop(test)


@pytest.mark.parametrize("granted", [False, True])
def test_a_request_that_is_cancelled_while_it_waits_holds_nothing(granted: bool) -> None:
    async def test() -> None:
        shared = budgets()
        first, second, third = (Holdings(shared) for _ in range(3))
        await first.take(Item.FILES, 100)
        waiting = running(second.take(Item.FILES, 60))
        behind = running(third.take(Item.FILES, 60))
        await settle()
        if granted:  # at the same moment
            first.close()
        waiting.cancel()
        await asyncio.wait([waiting])
        second.close()
        first.close()
        await behind
        assert shared.held[Resource.MEDIA] == 60

    on_loop(test)


def test_no_request_begins_while_a_running_one_waits_for_memory() -> None:
    async def test() -> None:
        gate = Admission(limits(waiting=1, totals={**UNLIMITED, Resource.MEDIA: 100}))
        begun, release = list[str](), asyncio.Event()

        async def work(name: str, nbytes: int) -> None:
            async with gate.permit(Record()) as permit:
                begun.append(name)
                await permit.holdings.take(Item.FILES, nbytes)
                await release.wait()

        tasks = [running(work("first", 90)), running(work("second", 90))]
        await settle()
        tasks.append(running(work("third", 1)))
        await settle()
        assert begun == ["first", "second"]
        with pytest.raises(MediaMemoryFull, match="the limit is 100") as refused:
            await work("fourth", 1)
        assert refused.value.retry_after_s
        release.set()
        await asyncio.gather(*tasks)
        assert begun == ["first", "second", "third"]
        assert gate.budgets.held[Resource.MEDIA] == gate.slots.taken == 0

    on_loop(test)

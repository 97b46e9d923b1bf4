"""Admission: permits, the order in which they are given, and refusals."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.errors import RateLimited, ServerBusy, Unavailable
from server.request import slots
from server.request.admission import Admission, Turn
from server.request.limits import Bucket, Limits, Quota
from server.telemetry.record import Prompt, Record
from tests.admission import limits


def admission(
    running: int = 1, waiting: int = 100, wait_s: float = 1000.0, in_engine: int = 100
) -> Admission:
    return Admission(limits(running, waiting, wait_s, in_engine))


async def hold(
    gate: Admission, group: str, work: Callable[[], Awaitable[Any]], *quotas: Quota
) -> None:
    async with gate.permit(Record(key_group=group), quotas):
        await work()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_no_more_requests_run_than_the_limit_and_all_get_their_turn() -> None:
    async def run() -> None:
        gate = admission(running=3)
        most = done = 0

        async def work() -> None:
            nonlocal most, done
            most = max(most, gate.slots.taken)
            await asyncio.sleep(0.001)
            done += 1

        await asyncio.gather(*(hold(gate, "", work) for _ in range(50)))
        assert (most, done, gate.slots.taken) == (3, 50, 0)

    asyncio.run(run())


def test_a_group_that_floods_does_not_delay_another() -> None:
    async def run() -> None:
        gate, served = admission(running=1), list[str]()

        async def work(group: str) -> None:
            served.append(group)
            await asyncio.sleep(0)

        flood = [asyncio.create_task(hold(gate, "heavy", lambda: work("heavy"))) for _ in range(50)]
        await settle()
        await hold(gate, "light", lambda: work("light"))
        assert served.index("light") < 20
        await asyncio.gather(*flood)

    asyncio.run(run())


def test_a_group_that_has_nothing_running_does_not_wait_for_another() -> None:
    async def run() -> None:
        gate, release = admission(running=16), asyncio.Event()
        flood = [asyncio.create_task(hold(gate, "heavy", release.wait)) for _ in range(50)]
        await settle()
        others = [asyncio.create_task(hold(gate, name, release.wait)) for name in "aabc"]
        await settle()
        assert gate.slots.taken == 18  # one of "a" and one of "b": two slots are reserved
        release.set()
        await asyncio.gather(*flood, *others)
        assert gate.slots.taken == 0

    asyncio.run(run())


def test_a_group_takes_only_its_share_of_the_engine_while_another_is_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        monkeypatch.setattr(slots, "_ACTIVE_S", 0.5)
        monkeypatch.setattr("server.request.admission._HEAD_START_S", 0.0)
        gate = Admission(limits(in_engine=8, group_share=0.5))
        release = asyncio.Event()

        async def answer(name: str, until: asyncio.Event) -> None:
            async with gate.permit(Record(key_group=name)) as permit:
                await permit.enter_engine("1")
                await until.wait()

        def begin(name: str, count: int, until: asyncio.Event) -> list[asyncio.Task[None]]:
            return [asyncio.create_task(answer(name, until)) for _ in range(count)]

        async def in_engine() -> int:
            await settle()
            return gate.engine_slots.taken

        end_of_light = asyncio.Event()
        light = begin("light", 2, end_of_light)
        heavy = begin("heavy", 20, release)
        assert await in_engine() == 2 + 4
        more = begin("light", 1, release)
        assert await in_engine() == 3 + 4  # it does not wait behind the others
        end_of_light.set()
        await asyncio.gather(*light)
        heavy[0].cancel()
        assert await in_engine() == 1 + 4
        release.set()
        await asyncio.gather(*heavy[1:], *more)

        release.clear()
        heavy = begin("heavy", 20, release)
        assert await in_engine() == 4
        await asyncio.sleep(0.6)
        heavy[0].cancel()  # the light group has not come back
        assert await in_engine() == 8
        release.set()
        await asyncio.gather(*heavy[1:])
        assert gate.engine_slots.taken == 0

    asyncio.run(run())


def test_groups_that_flood_together_divide_all_slots() -> None:
    async def run() -> None:
        places = slots.Slots(8, group_share=0.25)
        asked = [asyncio.create_task(places.take("heavy", 1.0)) for _ in range(8)]
        await settle()
        assert places.taken == 8
        asked += [asyncio.create_task(places.take("other", 1.0)) for _ in range(8)]
        await settle()
        asked += [asyncio.create_task(places.take("heavy", 1.0)) for _ in range(8)]
        await settle()
        for _ in range(8):
            places.free("heavy")
        await settle()
        taken = [sum(task.done() for task in asked[at : at + 8]) for at in (8, 16)]
        assert taken == [4, 4]
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(run())


def test_a_group_with_few_requests_has_a_head_start_for_half_of_the_time_at_most() -> None:
    async def run() -> None:
        places = slots.Slots(8, group_share=0.5, head_start_s=0.4)
        places.add("light")
        places.free("light")  # it is active from now on
        for _ in range(4):
            places.add("heavy")
        waiting = [asyncio.create_task(places.take("heavy", 1.0)) for _ in range(4)]
        await settle()
        began = time.monotonic()
        assert places.take_now("light")
        places.free("heavy")
        assert places.taken == 4  # the free place stays free
        assert places.take_now("light")
        places.free("light")
        await waiting[0]
        assert time.monotonic() - began > 0.39
        assert places.take_now("light")  # too early for another one
        places.free("heavy")
        await asyncio.wait_for(waiting[1], 0.3)
        await asyncio.sleep(0.41)
        assert places.take_now("light")
        places.free("heavy")
        await settle()
        assert not waiting[2].done()
        for _ in range(3):
            places.free("light")
        await asyncio.gather(*waiting[2:3])  # nobody is ahead any more
        for _ in range(4):
            places.free("heavy")
        await asyncio.gather(*waiting)

    asyncio.run(run())


def test_a_head_start_begins_when_the_media_are_loaded_and_ends_with_the_last_request() -> None:
    async def run() -> None:
        places = slots.Slots(8, group_share=0.5, head_start_s=60.0)
        places.add("light")
        places.free("light")
        for _ in range(4):
            places.add("heavy")
        waiting = [asyncio.create_task(places.take("heavy", 1.0)) for _ in range(4)]
        await settle()
        places.expect("heavy")  # which has its share
        places.free("heavy")
        await waiting[0]
        places.expect("light")
        for _ in range(4):
            places.free("heavy")
        await settle()
        assert places.taken == 0  # all wait, even with an empty engine
        assert places.take_now("third")
        places.free("third")
        assert places.take_now("light")
        await settle()
        assert places.taken == 1
        places.free("light")
        await asyncio.gather(*waiting[1:])
        assert places.take_now("light")  # too early for another one
        places.free("heavy")
        assert places.take_now("heavy")
        for group in ("light", "heavy", "heavy", "heavy"):
            places.free(group)
        assert places.taken == 0

    asyncio.run(run())


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async def run() -> None:
        gate, release = admission(running=1, waiting=2), asyncio.Event()
        held = [asyncio.create_task(hold(gate, "", release.wait)) for _ in range(3)]
        await settle()
        with pytest.raises(ServerBusy, match="2 requests wait already") as refused:
            await hold(gate, "", release.wait)
        assert refused.value.retry_after_s
        release.set()
        await asyncio.gather(*held)
        assert gate.slots.taken == 0

    asyncio.run(run())


def test_a_check_refuses_what_a_permit_would_and_counts_nothing() -> None:
    async def run() -> None:
        gate, release = admission(running=1, waiting=1), asyncio.Event()
        quota = Quota("key", Limits(concurrency=1, requests_per_minute=2))
        record = Record()
        for _ in range(5):
            gate.check(record, [quota])
        assert record.headers == []
        held = [asyncio.create_task(hold(gate, "", release.wait, quota))]
        await settle()
        with pytest.raises(RateLimited):
            gate.check(record, [quota])
        assert dict(record.headers)[b"x-ratelimit-remaining-requests"] == b"1"
        held += [asyncio.create_task(hold(gate, "", release.wait))]
        await settle()
        with pytest.raises(ServerBusy, match="1 requests wait already"):
            gate.check(Record(), [])
        release.set()
        await asyncio.gather(*held)

    asyncio.run(run())


def test_a_request_whose_turn_would_come_after_its_deadline_is_refused() -> None:
    async def run() -> None:
        gate, done = admission(running=1, waiting=1000), 0

        async def work() -> None:
            nonlocal done
            await asyncio.sleep(0.01)
            done += 1

        tasks = [asyncio.create_task(hold(gate, "", work)) for _ in range(200)]
        while done < 50:  # the rate is known then
            await asyncio.sleep(0.01)
        soon = Record(deadline=time.monotonic() + 0.01)
        with pytest.raises(ServerBusy, match="would wait about"):
            async with gate.permit(soon):
                raise AssertionError("it had its turn")
        later = Record(deadline=time.monotonic() + 60.0)
        async with gate.permit(later):
            assert gate.slots.taken == 1
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_turn_that_comes_too_late_for_the_deadline_is_not_taken() -> None:
    """A request that would almost certainly end after its deadline is refused, not begun."""

    async def run() -> None:
        gate = admission(running=1)
        for _ in range(20):
            gate.service_times.note(5.0)
        release, began = asyncio.Event(), False

        async def late() -> None:
            nonlocal began
            async with gate.permit(Record(deadline=time.monotonic() + 4.0)):
                began = True

        holder = asyncio.create_task(hold(gate, "", release.wait))
        await settle()
        waiter = asyncio.create_task(late())
        await settle()
        release.set()
        with pytest.raises(ServerBusy, match="before its deadline"):
            await waiter
        await holder
        assert not began
        assert gate.slots.taken == 0

    asyncio.run(run())


def test_without_an_engine_all_requests_are_refused_and_leave_nothing() -> None:
    async def run() -> None:
        away: Unavailable | None = None
        gate = Admission(limits(1, 100, 1000.0, 100), engine_is_away=lambda: away)
        release = asyncio.Event()
        holder = asyncio.create_task(hold(gate, "", release.wait))
        await settle()
        waiters = [asyncio.create_task(hold(gate, "", release.wait)) for _ in range(100)]
        await settle()
        assert len(gate.slots.queue) == 100
        away = Unavailable("there is no engine")
        release.set()
        refused = await asyncio.gather(holder, *waiters, return_exceptions=True)
        assert sum(error is away for error in refused) == 100
        with pytest.raises(Unavailable):
            gate.check(Record(), [])
        assert (gate.slots.taken, gate.engine_requests) == (0, 0)
        assert not gate._rate._done, "the time without an engine does not count"
        away = None
        await hold(gate, "", settle)

    asyncio.run(run())


@pytest.mark.parametrize("settled", [True, False])
def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing(settled: bool) -> None:
    async def run() -> None:
        gate, release = admission(running=1), asyncio.Event()
        holder = asyncio.create_task(hold(gate, "", release.wait))
        waiter = asyncio.create_task(hold(gate, "", release.wait))
        await settle()
        if not settled:  # the turn comes at the same moment as the end
            release.set()
            await asyncio.sleep(0)
        waiter.cancel()
        release.set()
        await asyncio.gather(holder, waiter, return_exceptions=True)
        assert gate.slots.taken == 0
        await hold(gate, "", settle)

    asyncio.run(run())


def test_a_request_that_fails_gives_its_permit_back() -> None:
    async def run() -> None:
        gate = admission(running=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with gate.permit(Record()):
                    raise ZeroDivisionError
        assert gate.slots.taken == 0

    asyncio.run(run())


# ---------------------------------------------------------------------- limits of keys


def test_requests_per_minute() -> None:
    async def run() -> None:
        gate, quota = admission(10), Quota("key:a", Limits(requests_per_minute=2))
        record = Record()
        async with gate.permit(record, [quota]):
            pass
        assert (b"x-ratelimit-remaining-requests", b"1") in record.headers
        await hold(gate, "", settle, quota)
        late = Record()
        with pytest.raises(RateLimited, match="2 requests per minute") as refused:
            async with gate.permit(late, [quota]):
                pass
        assert (b"x-ratelimit-remaining-requests", b"0") in late.headers
        assert refused.value.retry_after_s in (29, 30)
        await hold(gate, "", settle, Quota("key:b", quota.limits))  # another key

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(tokens_per_minute=100), "100 tokens per minute"),
        (Limits(image_tokens_per_minute=50), "50 image tokens per minute"),
    ],
)
def test_tokens_are_charged_after_the_answer(limits: Limits, message: str) -> None:
    async def run() -> None:
        gate, quota = admission(10), Quota("key:a", limits)
        record = Record()
        async with gate.permit(record, [quota]):
            record.prompts["1"] = Prompt(tokens=120, images=1, image_tokens=100)
            record.completion_tokens = 10
        with pytest.raises(RateLimited, match=message):
            await hold(gate, "", settle, quota)

    asyncio.run(run())


def test_concurrency_counts_requests_that_wait_or_run() -> None:
    async def run() -> None:
        gate, quota = admission(1), Quota("key:a", Limits(concurrency=2))
        release = asyncio.Event()
        held = [asyncio.create_task(hold(gate, "", release.wait, quota)) for _ in range(2)]
        await settle()
        with pytest.raises(RateLimited, match="2 requests at the same time"):
            await hold(gate, "", settle, quota)
        release.set()
        await asyncio.gather(*held)
        await hold(gate, "", settle, quota)

    asyncio.run(run())


def test_the_limits_of_a_group_hold_for_all_of_its_keys() -> None:
    async def run() -> None:
        gate, group = admission(10), Quota("group:a", Limits(requests_per_minute=2))
        await hold(gate, "a", settle, group, Quota("key:1", Limits()))
        await hold(gate, "a", settle, group, Quota("key:2", Limits()))
        with pytest.raises(RateLimited):
            await hold(gate, "a", settle, group, Quota("key:3", Limits()))

    asyncio.run(run())


def test_the_headers_show_the_limit_with_the_least_left() -> None:
    async def run() -> None:
        gate, record = admission(10), Record()
        group = Quota("group:a", Limits(requests_per_minute=3, tokens_per_minute=50))
        key = Quota("key:1", Limits(requests_per_minute=9))
        async with gate.permit(record, [group, key]):
            pass
        values = {name: value for name, value in record.headers if b"limit-limit" in name}
        assert values == {
            b"x-ratelimit-limit-requests": b"3",
            b"x-ratelimit-limit-tokens": b"50",
        }
        assert len(record.headers) == 6

    asyncio.run(run())


def test_new_limits_of_a_key_take_effect_and_keep_what_runs() -> None:
    async def run() -> None:
        gate, release = admission(10), asyncio.Event()
        old, new = (Quota("key:a", Limits(concurrency=most)) for most in (2, 1))
        held = asyncio.create_task(hold(gate, "", release.wait, old))
        await settle()
        with pytest.raises(RateLimited):
            await hold(gate, "", settle, new)
        release.set()
        await held
        await hold(gate, "", settle, new)

    asyncio.run(run())


def test_a_bucket_refills_and_can_be_in_debt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = Bucket(60, [0.0, 0.0], is_new=True)
    bucket.take(90)
    assert (bucket.left(), bucket.seconds_until(1)) == (-30, 31)
    now = 31.0
    assert (bucket.left(), bucket.seconds_until(1)) == (1, 0)
    now = 1000.0
    assert bucket.left() == 60


# ---------------------------------------------------------------------- requests of batches


def test_requests_of_batches_begin_only_while_no_other_waits() -> None:
    async def run() -> None:
        gate, order = admission(running=2), list[str]()
        first = await gate.background_turn("a")
        waiting = asyncio.create_task(gate.background_turn("a"))
        await settle()
        assert not waiting.done()  # one place is left for others
        ended = asyncio.Event()

        async def work() -> None:
            order.append("other")
            await ended.wait()

        others = [asyncio.create_task(hold(gate, "", work)) for _ in range(4)]
        await settle()
        assert len(order) == 1  # in the place that was left
        first.release()
        await settle()
        assert (len(order), waiting.done()) == (2, False)
        ended.set()
        await asyncio.gather(*others)
        assert len(order) == 4
        (await waiting).release()
        assert gate.slots.taken == 0

    asyncio.run(run())


def test_batches_take_few_places_while_other_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gate, now = admission(running=32), 100.0
        monkeypatch.setattr("server.request.slots.time.monotonic", lambda: now)
        begun: list[Turn] = []

        async def item() -> None:
            begun.append(await gate.background_turn(""))

        async def work() -> None:
            pass

        await hold(gate, "", work)
        items = [asyncio.create_task(item()) for _ in range(60)]
        await settle()
        assert len(begun) == 28 // 8
        now += 4.0
        await hold(gate, "", work)
        now += 4.0
        begun[0].release()
        await settle()
        assert len(begun) == 28 // 8 + 1
        now += 2.0
        begun[1].release()
        await settle()
        assert len(begun) == 28 + 2
        for item_ in items:
            item_.cancel()

    asyncio.run(run())


def test_a_turn_of_a_batch_that_is_cancelled_is_given_back() -> None:
    async def run() -> None:
        gate = admission(running=2)
        first = await gate.background_turn("")
        waiting = [asyncio.create_task(gate.background_turn("")) for _ in range(3)]
        await settle()
        first.release()  # the first of them has its turn, but has not noticed
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert gate.slots.taken == 0
        turn = await gate.background_turn("")
        turn.release()
        turn.release()
        assert gate.slots.taken == 0

    asyncio.run(run())


def test_turns_of_batches_are_fair_among_groups() -> None:
    async def run() -> None:
        gate, order = admission(running=2), list[str]()

        async def batch(group: str) -> None:
            for _ in range(4):
                turn = await gate.background_turn(group)
                order.append(group)
                await asyncio.sleep(0)
                turn.release()

        await asyncio.gather(*(batch(group) for group in ("a", "a", "a", "b")))
        assert order[:8].count("b") >= 3

    asyncio.run(run())


def test_a_request_of_a_batch_is_charged_but_not_refused() -> None:
    async def run() -> None:
        gate = admission(running=4)
        quota = Quota("group:a", Limits(requests_per_minute=4, concurrency=1, tokens_per_minute=10))
        turns = [await gate.background_turn("a", [quota]) for _ in range(2)]
        third = asyncio.create_task(gate.background_turn("a", [quota]))
        await settle()
        assert not third.done()  # half of the requests of a minute is left
        third.cancel()
        for turn in turns:
            record = Record(key_group="a")
            async with gate.permit(record, [quota], turn=turn):
                record.completion_tokens = 4
            turn.release()
        assert gate.usage(quota).active == 0
        async with gate.permit(Record(key_group="a"), [quota]):
            pass
        async with gate.permit(Record(key_group="a"), [quota]):
            pass
        with pytest.raises(RateLimited):
            async with gate.permit(Record(key_group="a"), [quota]):
                pass

    asyncio.run(run())

"""The path of a request from the server to vLLM's engine core."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from vllm.exceptions import RetryableRequestError
from vllm.multimodal.cache import LruKeyReplicatedSenderCache, MultiModalProcessorOnlyCache
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalSharedField,
    PlaceholderRange,
)

from server.engine.vllm_adapter.group_names import carry_context, name_by_group
from server.engine.vllm_adapter.outcomes import Outcomes
from server.engine.vllm_adapter.processor_cache import PooledItem, ProcessorCache, copied
from server.engine.vllm_adapter.send import Gate, Sender, keep_in_group
from server.request.admission import Admission
from server.request.context import RequestContext, entered
from server.request.groups import prefixed, salted
from server.telemetry.record import Record
from tests.admission import limits

Core = Callable[[Any], Awaitable[None]]
CAPACITY = 100  # bytes


def of_size(nbytes: int) -> SimpleNamespace:
    """A model's configuration with a processor cache of `nbytes`."""
    config = SimpleNamespace(mm_processor_cache_gb=nbytes / (1 << 30))
    return SimpleNamespace(get_multimodal_config=lambda: config)


def item(nbytes: int = 64) -> PooledItem:
    data = torch.arange(nbytes, dtype=torch.uint8)
    field = MultiModalSharedField(batch_size=1)
    return PooledItem({"x": MultiModalFieldElem(data=data, field=field)})


def empty(nbytes: int) -> PooledItem:
    """An item that the engine held when the request was rendered."""

    async def refill() -> PooledItem:
        await asyncio.sleep(0)
        return item(nbytes)

    found = PooledItem()
    found.refill = refill
    return found


def feature(data: Any, name: str = "k") -> MultiModalFeatureSpec:
    position = PlaceholderRange(offset=0, length=1)
    return MultiModalFeatureSpec(
        data=data, modality="image", identifier=name, mm_position=position, mm_hash=name
    )


def request(*features: MultiModalFeatureSpec, name: str = "r") -> Any:
    return SimpleNamespace(
        request_id=name,
        external_req_id=name,
        mm_features=list(features),
        prompt_token_ids=[1, 2],
        lora_request=None,
        sampling_params=None,
        cache_salt=None,
    )


def as_received(request: Any) -> list[Any]:
    """The features as they arrive in the engine's process."""
    return [
        replace(each, data=copied(each.data) if each.data else None) for each in request.mm_features
    ]


def sender(
    core: Core,
    cache: ProcessorCache | None,
    gate: Gate,
    states: Any = None,
    aborted: list[str] | None = None,
) -> Sender:
    async def abort(request_id: str, *, internal: bool) -> None:
        assert internal
        if aborted is not None:
            aborted.append(request_id)

    engine: Any = SimpleNamespace(
        engine_core=SimpleNamespace(add_request_async=core),
        output_processor=SimpleNamespace(request_states=states or {}),
        abort=abort,
    )
    return Sender(engine, cache, Outcomes(), gate)


def sent_by(cache: ProcessorCache, core: Core, *requests: Any, states: Any = None) -> None:
    """Send `requests` one after the other."""

    async def run() -> None:
        with entered(RequestContext(Record())):
            sending = sender(core, cache, Gate(), states)
            for each in requests:
                await sending.send(each)

    asyncio.run(run())


# ---------------------------------------------------------------------- the processor cache


def test_cached_features_outlive_the_request_that_sent_them() -> None:
    """In a front end that caches the features itself, as with several engines."""
    config: Any = of_size(1 << 20)
    cache = ProcessorCache(MultiModalProcessorOnlyCache(config))
    cache.remember("k", ())
    sent: list[Any] = []

    async def core(request: Any) -> None:
        sent.append(request.mm_features[0].data)

    picture = item()
    lent = picture["x"].data
    sent_by(cache, core, request(feature(picture)))
    assert not picture  # the request's own memory is released
    sent_by(cache, core, request(feature(PooledItem())))
    for data in sent:
        assert torch.equal(data["x"].data, item()["x"].data)
        assert data["x"].data.data_ptr() != lent.data_ptr()


def test_features_of_an_unsent_request_are_not_cached() -> None:
    config: Any = of_size(1 << 20)
    cache = ProcessorCache(LruKeyReplicatedSenderCache(config))
    cache.remember("k", ())

    async def broken(request: Any) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        sent_by(cache, broken, request(feature(item())))
    assert not cache.is_cached_item("k")


def test_features_missing_on_the_server_make_the_request_retryable() -> None:
    config: Any = of_size(1 << 20)
    cache = ProcessorCache(LruKeyReplicatedSenderCache(config))

    async def core(request: Any) -> None:
        raise AssertionError("sent without its features")

    with pytest.raises(RetryableRequestError):
        sent_by(cache, core, request(feature(PooledItem())))


sizes = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, CAPACITY + 20), min_size=6)
prompts = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5), max_size=12)


@hypothesis.given(sizes, prompts)
def test_the_engine_always_finds_the_features_it_needs(
    sizes: dict[str, int], prompts: list[list[str]]
) -> None:
    """With vLLM's two caches: every image sent without features is in the engine's cache, although
    images of one request evict each other, and some are larger than the cache."""
    config: Any = of_size(CAPACITY)
    cache = ProcessorCache(LruKeyReplicatedSenderCache(config))
    engine = LruKeyReplicatedReceiverCache(config)

    async def core(request: Any) -> None:
        received = as_received(request)
        engine.get_and_update_features(received)  # raises if any is missing
        for each in received:
            assert each.data["x"].data.nbytes == sizes[each.identifier]

    for names in prompts:
        features = []
        for name in names:
            known = cache.is_cached_item(name)
            cache.remember(name, ())
            features.append(feature(empty(sizes[name]) if known else item(sizes[name]), name))
        sent_by(cache, core, request(*features))
        assert {name for name in sizes if cache.is_cached_item(name)} == set(engine._cache)


def test_every_answer_to_one_prompt_gets_the_features() -> None:
    """vLLM sends a request for each of `n` answers, with the same features, which evict each other
    from the cache."""
    config: Any = of_size(CAPACITY)
    cache = ProcessorCache(LruKeyReplicatedSenderCache(config))
    engine = LruKeyReplicatedReceiverCache(config)
    for name in "ab":
        cache.remember(name, ())
    received: list[list[int]] = []

    async def core(request: Any) -> None:
        features = as_received(request)
        engine.get_and_update_features(features)
        received.append([each.data["x"].data.nbytes for each in features])

    features = [feature(item(70), "a"), feature(item(60), "b")]
    parent = SimpleNamespace(sampling_params=SimpleNamespace(n=3))
    states = {
        f"{index}_r": SimpleNamespace(parent_req=parent, request_index=index) for index in range(3)
    }
    children = [request(*features, name=name) for name in states]
    sent_by(cache, core, *children, states=states)
    assert received == [[70, 60]] * 3
    assert [bool(each.data) for each in features] == [True, False]  # the cached one was released


# ---------------------------------------------------------------------- the gate


def test_requests_wait_while_the_gate_is_closed() -> None:
    async def run() -> None:
        gate, arrived, let_go = Gate(), asyncio.Event(), asyncio.Event()
        order: list[str] = []

        async def core(request: Any) -> None:
            arrived.set()
            await let_go.wait()
            order.append(request.request_id)

        async def close() -> None:
            async with gate.closed():
                order.append("closed")
                later = asyncio.create_task(sending.send(request(name="second")))
                for _ in range(5):
                    await asyncio.sleep(0)
                order.append("open")
            await later

        with entered(RequestContext(Record())):
            sending = sender(core, None, gate)
            first = asyncio.create_task(sending.send(request(name="first")))
            await asyncio.wait(
                [first, asyncio.create_task(arrived.wait())], return_when="FIRST_COMPLETED"
            )
            closing = asyncio.create_task(close())
            await asyncio.sleep(0)
            let_go.set()
            await asyncio.gather(first, closing)
        assert order == ["first", "closed", "open", "second"]

    asyncio.run(run())


def test_a_request_without_a_context_is_an_error() -> None:
    async def core(request: Any) -> None: ...

    with pytest.raises(LookupError):
        asyncio.run(sender(core, None, Gate()).send(request()))


# ---------------------------------------------------------------------- groups


def test_names_and_salts_differ_between_groups() -> None:
    names = {group: prefixed("name", group) for group in ("", "a", "b")}
    assert names[""] == "name"
    assert len(set(names.values())) == 3
    assert prefixed(names["a"], "a") == names["a"]
    assert prefixed(names["a"], "b") not in (names["a"], names["b"])
    salts = {(group, s): salted(s, group) for group in ("", "a", "b") for s in (None, "a", "b")}
    assert [salts["", s] for s in (None, "a", "b")] == [None, "a", "b"]
    assert len(set(salts.values())) == 9
    # The same in every process and on every machine.
    assert names["a"] == "17762fddd969a453925d65717ac3eea2-name"


def test_a_request_is_sent_with_the_names_of_its_group() -> None:
    sent = request(feature(item(), "uuid"), feature(item(), prefixed("hash", "a")))
    keep_in_group(sent, "a")
    names = [prefixed("uuid", "a"), prefixed("hash", "a")]
    assert [each.mm_hash for each in sent.mm_features] == names
    assert [each.identifier for each in sent.mm_features] == names
    assert sent.cache_salt == salted(None, "a")
    keep_in_group(without := request(feature(item(), "uuid")), "")
    assert (without.mm_features[0].mm_hash, without.cache_salt) == ("uuid", None)


def test_names_of_items_have_the_group_of_their_request() -> None:
    """In a thread of vLLM, for client-chosen names and for hashes."""
    processor: Any = SimpleNamespace(
        _get_mm_hashes=lambda inputs: {"video": [inputs], "audio": ["0" * 64]}
    )
    name_by_group(processor)
    with ThreadPoolExecutor(1) as executor:
        carry_context(executor)
        executor.submit(int).result()  # the thread starts before any group is set

        async def names(group: str) -> Any:
            loop = asyncio.get_running_loop()
            with entered(RequestContext(Record(key_group=group))):
                return await loop.run_in_executor(executor, processor._get_mm_hashes, "uuid")

        found = {group: asyncio.run(names(group)) for group in ("", "a", "b")}
    assert found[""] == {"video": ["uuid"], "audio": ["0" * 64]}
    for group in ("a", "b"):
        assert found[group] == {
            "video": [prefixed("uuid", group)],
            "audio": [prefixed("0" * 64, group)],
        }


# ---------------------------------------------------------------------- slots of the engine


def admitted(in_engine: int) -> Admission:
    return Admission(limits(in_engine=in_engine))


async def pass_on(request: Any) -> None:
    """The engine takes every request."""


def test_requests_beyond_the_slots_of_the_engine_wait_until_one_leaves_it() -> None:
    sent: list[str] = []

    async def core(request: Any) -> None:
        sent.append(request.request_id)

    async def run() -> None:
        admission, sending = admitted(in_engine=1), sender(core, None, Gate())

        async def answer(name: str, over: asyncio.Event) -> None:
            async with admission.permit(Record()) as permit:
                with entered(RequestContext(Record(), permit=permit)):
                    await sending.send(request(name=name))
                    await over.wait()

        first, second = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(answer("a", first)), asyncio.create_task(answer("b", second))]
        await asyncio.sleep(0.01)
        assert sent == ["a"]
        first.set()
        await asyncio.sleep(0.01)
        assert sent == ["a", "b"]
        second.set()
        await asyncio.gather(*tasks)
        assert admission.engine_slots.taken == admission.slots.taken == 0

    asyncio.run(run())


def test_answers_to_one_prompt_do_not_wait_for_each_other() -> None:
    async def run() -> None:
        admission, sending = admitted(in_engine=1), sender(pass_on, None, Gate())
        async with admission.permit(Record()) as permit:
            with entered(RequestContext(Record(), permit=permit)):
                for name in ("0_r", "1_r", "2_r"):
                    await sending.send(request(name=name))
                assert admission.engine_slots.taken == 3
                permit.leave_engine("1_r")
                permit.leave_engine("1_r")
                assert admission.engine_slots.taken == 2
        assert admission.engine_slots.taken == 0

    asyncio.run(run())


def test_a_request_that_gets_its_slot_after_its_answer_gives_it_back() -> None:
    """As one with `background`, whose client has its answer before the engine has the request."""

    async def run() -> None:
        admission, sending = admitted(in_engine=1), sender(pass_on, None, Gate())
        async with admission.permit(Record()) as first:
            with entered(RequestContext(Record(), permit=first)):
                await sending.send(request(name="a"))
            async with admission.permit(Record()) as second:
                with entered(RequestContext(Record(), permit=second)):
                    late = asyncio.create_task(sending.send(request(name="b")))
                    await asyncio.sleep(0.01)
        await late
        assert admission.engine_slots.taken == 0

    asyncio.run(run())


@pytest.mark.parametrize("siblings", [False, True])
def test_vllm_forgets_a_request_that_is_cancelled_before_it_is_sent(siblings: bool) -> None:
    parent = SimpleNamespace(request_id="parent") if siblings else None
    states = {"b": SimpleNamespace(parent_req=parent)}
    aborted: list[str] = []

    async def run() -> None:
        admission = admitted(in_engine=1)
        sending = sender(pass_on, None, Gate(), states, aborted)

        async def answer(name: str) -> None:
            async with admission.permit(Record()) as permit:
                with entered(RequestContext(Record(), permit=permit)):
                    await sending.send(request(name=name))
                    await asyncio.Event().wait()

        first, second = asyncio.create_task(answer("a")), asyncio.create_task(answer("b"))
        await asyncio.sleep(0.01)
        for task in (second, first):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert admission.engine_slots.taken == admission.slots.taken == 0

    asyncio.run(run())
    assert aborted == ["parent" if siblings else "b"]

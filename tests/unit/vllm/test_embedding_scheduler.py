"""Both halves of the connector, step by step, and the socket to the server; without an engine."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import ECTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from server.engine.embedding_cache import control as control_module
from server.engine.embedding_cache import worker as worker_module
from server.engine.embedding_cache.arena import PAGE_BYTES, Arena
from server.engine.embedding_cache.control import (
    Action,
    Clear,
    ControlClient,
    ControlServer,
    Describe,
    ExpectReset,
    Prefetch,
)
from server.engine.embedding_cache.scheduler import ENCODED, Scheduler
from server.engine.embedding_cache.store import EmbeddingStore, stored_name
from server.engine.embedding_cache.worker import DTYPES, Orders, Report, Worker
from tests.embeddings import GatedDisk, wait_until

WIDTH = 64
TOKENS = 16


@pytest.fixture(scope="module")
def config(repository: Path) -> VllmConfig:
    args = EngineArgs(model=str(repository / "server" / "demo"), max_model_len=1024)
    config = args.create_engine_config()
    config.ec_transfer_config = ECTransferConfig(
        ec_connector="EmbeddingCacheConnector", ec_role="ec_both"
    )
    config.ec_transfer_config.mm_encoder_output_widths = {"image": WIDTH}
    return config


class Engine:
    """The scheduler and a worker; a test runs them through the steps of vLLM."""

    def __init__(self, config: VllmConfig, store: EmbeddingStore, patience_s: float = 0.0) -> None:
        self.store = store
        self.scheduler = Scheduler(config, store, patience_s)
        self.worker = Worker()
        self.on_gpu: dict[str, torch.Tensor] = {}
        self.encoded: list[str] = []

    def schedule(
        self, *requests: Request, freed: tuple[str, ...] = (), preempted: bool = False
    ) -> Orders:
        """A pass of vLLM's scheduler with room for all images of the requests. `preempted`:
        in the end nothing is scheduled."""
        self.encode: list[str] = []
        fresh: set[str] = set()
        for name in freed:
            del self.on_gpu[name]
        for request in requests:
            if not self.scheduler.ensure(request, 0):
                continue
            for index, feature in enumerate(request.mm_features):
                name = feature.identifier
                if name in self.on_gpu or name in fresh:
                    continue
                if not self.scheduler.has(name):
                    self.encode.append(name)
                fresh.add(name)
                self.scheduler.allocated(request, index)
        output = SchedulerOutput.make_empty()
        output.free_encoder_mm_hashes = list(freed)
        output.total_num_scheduled_tokens = 0 if preempted else 1
        return self.scheduler.orders(output)

    def work(self, orders: Orders, encode: list[str]) -> Report:
        self.worker.load(orders, self.on_gpu)
        for name in encode:
            self.on_gpu[name] = embedding(name)
            self.encoded.append(name)
            self.worker.save(orders, name, self.on_gpu[name])
        return self.worker.report(orders)

    def step(self, *requests: Request, freed: tuple[str, ...] = ()) -> None:
        orders = self.schedule(*requests, freed=freed)
        self.scheduler.reported(self.work(orders, self.encode))


def embedding(name: str, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(stored_name(name)[:8], 16))
    return torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float32)


def request(*images: str, tokens: int = TOKENS, number: list[int] = [0]) -> Request:  # noqa: B006
    number[0] += 1
    features = [
        MultiModalFeatureSpec(
            data=None,
            modality="image",
            identifier=name,
            mm_position=PlaceholderRange(offset=index * tokens, length=tokens),
            mm_hash=name,
        )
        for index, name in enumerate(images)
    ]
    prompt = [1] * (tokens * len(images) + 1)
    return Request(f"request{number[0]}", prompt, SamplingParams(), None, mm_features=features)


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(worker_module, "_device", lambda: "cpu")


@pytest.fixture
def engine(config: VllmConfig) -> Iterator[Engine]:
    config.model_config.dtype = torch.float32
    store = EmbeddingStore(Arena(8 * PAGE_BYTES))
    engine = Engine(config, store)
    yield engine
    store.close()
    assert store.arena.free_bytes == store.arena.nbytes, "leaked pages"
    engine.worker._memory = None
    store.arena.close()


def test_an_image_is_encoded_once_and_then_loaded(engine: Engine) -> None:
    first, second = request("a", "b"), request("b", "a")
    engine.step(first)
    assert engine.encoded == ["a", "b"]
    engine.step(second, freed=("a", "b"))
    assert engine.encoded == ["a", "b"]
    for name in "ab":
        assert torch.equal(engine.on_gpu[name], embedding(name))
    assert engine.scheduler.finished(first) == {ENCODED: [True, True]}
    assert engine.scheduler.finished(second) == {ENCODED: [False, False]}
    assert engine.scheduler.finished(second) is None
    assert engine.scheduler.gpu_snapshot()["tokens"] == 2 * TOKENS
    assert not engine.scheduler._requests


def test_an_image_of_a_request_never_scheduled_is_unpinned(engine: Engine) -> None:
    engine.step(request("a"))
    waiting = request("a")
    engine.scheduler.ensure(waiting, 0)
    assert engine.scheduler.has("a")
    assert engine.store._index.get("a").pins == 1  # type: ignore[union-attr]
    engine.step(freed=("a",))
    assert engine.store._index.get("a").pins == 0  # type: ignore[union-attr]


def test_orders_of_a_preempted_step_are_in_the_next_step(engine: Engine) -> None:
    engine.step(request("a"))
    nothing = engine.schedule(request("a", "b"), freed=("a",), preempted=True)
    assert not nothing.loads
    assert not nothing.saves
    orders = engine.schedule()
    assert (list(orders.loads), list(orders.saves)) == (["a"], ["b"])
    engine.scheduler.reported(engine.work(orders, ["b"]))
    assert torch.equal(engine.on_gpu["a"], embedding("a"))
    assert all(engine.store._index.get(name).pins == 0 for name in "ab")  # type: ignore[union-attr]


def test_an_image_with_the_name_of_another_is_never_loaded_in_its_shape(engine: Engine) -> None:
    """A client may give two of its videos the same name."""
    engine.step(request("a"))
    right, wrong = request("a"), request("a", tokens=2 * TOKENS)
    assert engine.scheduler.ensure(right, 0)
    assert engine.scheduler.has("a")
    assert engine.scheduler.ensure(wrong, 0)
    assert not engine.scheduler.has("a")
    engine.scheduler.allocated(wrong, 0)
    orders = engine.scheduler.orders(_step())
    assert not orders.loads
    engine.scheduler.reported(engine.worker.report(orders))
    assert engine.scheduler.finished(wrong) == {ENCODED: [True]}


def _step() -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.total_num_scheduled_tokens = 1
    return output


def test_an_embedding_of_another_shape_is_not_kept(engine: Engine) -> None:
    orders = engine.schedule(request("a"))
    engine.worker.save(orders, "a", embedding("a", TOKENS + 1))
    report = engine.worker.report(orders)
    assert report.saved == {"a": False}
    engine.scheduler.reported(report)
    assert engine.store.arena.free_bytes == engine.store.arena.nbytes


def test_a_save_that_did_not_happen_frees_its_pages(engine: Engine) -> None:
    orders = engine.schedule(request("a"))
    engine.scheduler.reported(engine.work(orders, []))
    assert engine.store.arena.free_bytes == engine.store.arena.nbytes


def test_reports_of_overlapping_steps_around_a_clear_are_matched(engine: Engine) -> None:
    """vLLM schedules the next step before this one has reported: the first report must
    not be taken for that of the second."""
    first = engine.schedule(request("a"))
    engine.store.clear()
    engine.scheduler.forget_gpu()
    second = engine.schedule(request("a"))
    assert first.saves["a"] != second.saves["a"]
    engine.scheduler.reported(engine.work(first, ["a"]))
    assert not engine.scheduler.has("a")
    del engine.on_gpu["a"]
    engine.scheduler.reported(engine.work(second, ["a"]))
    assert engine.store.arena.free_bytes == 7 * PAGE_BYTES
    engine.step(request("a"), freed=("a",))
    assert torch.equal(engine.on_gpu["a"], embedding("a"))
    assert engine.encoded == ["a", "a"]


def test_loads_of_overlapping_steps_keep_their_entries_pinned(engine: Engine) -> None:
    engine.step(request("a"))
    orders = [engine.schedule(request("a"), freed=("a",))]
    orders.append(engine.schedule(request("a")))
    assert all(order.loads for order in orders)
    engine.scheduler.reported(engine.work(orders[0], []))
    for number in range(20):
        engine.step(request(f"more{number}"))
    del engine.on_gpu["a"]
    engine.scheduler.reported(engine.work(orders[1], []))
    assert torch.equal(engine.on_gpu["a"], embedding("a"))


def test_an_image_with_an_adapter_is_not_cached(engine: Engine) -> None:
    asked = request("adapter:a")
    asked.mm_features[0].mm_hash = "a"
    engine.step(asked)
    assert engine.encoded == ["adapter:a"]
    assert engine.store.snapshot()["host"]["entries"] == 0


def test_a_request_waits_for_the_disk_only_for_a_limited_time(
    config: VllmConfig, tmp_path: Path
) -> None:
    config.model_config.dtype = torch.float32
    disk = GatedDisk(tmp_path)
    store = EmbeddingStore(Arena(8 * PAGE_BYTES), [disk])
    patient, hasty = Engine(config, store, 3600), Engine(config, store, -1)
    assert not patient.scheduler.ensure(request("a"), 0)
    assert hasty.scheduler.ensure(request("a"), 0)
    assert patient.scheduler.ensure(request("a"), TOKENS), "its image is in the KV cache"
    hasty.step(request("a"))
    assert hasty.encoded == ["a"]
    assert patient.scheduler.ensure(request("a"), 0)
    disk.gate.set()
    wait_until(lambda: disk.passed.count("write") == 1)
    store.close()
    wait_until(lambda: store.arena.free_bytes == store.arena.nbytes)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_embeddings_of_every_dtype_are_restored_unchanged(
    config: VllmConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.model_config, "dtype", dtype)
    store = EmbeddingStore(Arena(8 * PAGE_BYTES))
    engine = Engine(config, store)
    orders = engine.schedule(request("a", tokens=700))
    made = embedding("a", 700).to(dtype)
    engine.worker.save(orders, "a", made)
    engine.scheduler.reported(engine.worker.report(orders))
    engine.step(request("a", tokens=700))
    assert engine.on_gpu["a"].dtype == dtype
    assert torch.equal(engine.on_gpu["a"], made)
    store.close()


# ------------------------------------------------------------------ the socket to the server


def test_orders_from_the_server_are_executed_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two orders at a time: each waits for its own answer."""
    monkeypatch.setattr(control_module, "_ANSWER_TIMEOUT_S", 60)
    done: list[Action] = []
    reported, may_clear = threading.Event(), threading.Event()

    def obey(order: Action) -> None:
        if order == Clear():
            assert may_clear.wait(30)
        done.append(order)
        if order == Describe():
            reported.set()
        if isinstance(order, Prefetch):
            raise RuntimeError("an order that fails")

    async def play() -> None:
        async with ControlServer() as server:
            await server.clear()  # no engine is connected yet, so that none is waited for
            quick = ControlClient(server.address, "quick", lambda _: None, lambda: {"host": {}})
            client = ControlClient(server.address, "0", obey, lambda: {"host": {"done": len(done)}})
            while len(server.snapshots) < 2:
                await asyncio.sleep(0.01)
            report = asyncio.create_task(server.report())
            clear = asyncio.create_task(server.clear())
            assert {"host": {"done": 1}} in await report
            assert not clear.done(), "one of the engines has not answered"
            may_clear.set()
            await clear
            assert done == [Describe(), Clear()]
            server.prefetch([("a", 1)])
            await server.expect_reset()
            assert done == [Describe(), Clear(), Prefetch([("a", 1)]), ExpectReset()]
            assert {"host": {"done": 5}} in await server.report()
            assert not server._asked
            client.stop()
            quick.stop()

    asyncio.run(play())

"""Reports of vision encoder runs from vLLM's worker: the socket and the timers."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
import uvloop
import zmq

from server.engine.vllm_adapter import plugin
from server.engine.vllm_adapter.encode_timer import CudaTimer, WallTimer, connected, send, timed
from server.engine.vllm_adapter.encode_timing import EncoderRun, EncodeTimes

WAIT_S = 30


def address() -> str:
    """The address to which vLLM's worker is configured to report."""
    (found,) = plugin.asked().encoder_runs
    return found


class Runs(list[EncoderRun]):
    """The runs that the server receives."""

    def __call__(self, *run: Any) -> None:
        self.append(EncoderRun(*run))

    async def wait_for(self, number: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self) < number:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_reported_runs_reach_the_server(run: Callable[..., None]) -> None:
    runs, sent = Runs(), [EncoderRun(["a", "b"], 1.5, 2.25), EncoderRun([], 3.0, 3.0)]

    async def check() -> None:
        async with EncodeTimes(runs):
            with connected(address()) as socket:
                for each in sent:
                    send(socket, each)
                await runs.wait_for(2)

    run(check())
    assert runs == sent
    assert plugin.asked().encoder_runs == ()


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", b"x" * 100, *map(msgspec.msgpack.encode, ([1, 2, 3], [["a"], 1.0], {"a": 1}))],
)
def test_malformed_reports_are_ignored(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    runs, good = Runs(), EncoderRun(["a"], 1.0, 2.0)

    async def check() -> None:
        async with EncodeTimes(runs):
            with connected(address()) as socket:
                socket.send(garbage)
                send(socket, good)
                await runs.wait_for(1)

    asyncio.run(check())
    assert runs == [good]
    assert len(caplog.records) == 1


def test_a_failing_callback_does_not_stop_later_reports() -> None:
    runs = Runs()

    def fail_first(*run: Any) -> None:
        runs(*run)
        if len(runs) == 1:
            raise ValueError

    async def check() -> None:
        async with EncodeTimes(fail_first):
            with connected(address()) as socket:
                send(socket, EncoderRun(["a"], 1.0, 2.0))
                send(socket, EncoderRun(["b"], 1.0, 2.0))
                await runs.wait_for(2)

    asyncio.run(check())


def test_a_server_that_does_not_read_never_blocks_the_worker() -> None:
    """Reports beyond the sockets' capacity are dropped, and later ones are delivered."""
    runs, last = Runs(), EncoderRun(["last"], 0.0, 0.0)

    async def check() -> None:
        async with EncodeTimes(runs), asyncio.timeout(WAIT_S):
            with connected(address()) as socket:
                for number in range(20_000):  # the event loop does not run meanwhile
                    send(socket, EncoderRun(["x" * 100], number, number))
                while last not in runs:
                    send(socket, last)
                    await asyncio.sleep(0.01)

    asyncio.run(check())
    assert 0 < runs.index(last) < 20_000


def test_reports_without_a_listener_are_dropped_when_the_queue_is_full() -> None:
    with connected("ipc:///nonexistent/encoder") as socket:
        assert socket.poll(0, zmq.POLLOUT)
        for _ in range(20_000):
            send(socket, EncoderRun(["a"], 0.0, 0.0))
        assert not socket.poll(0, zmq.POLLOUT)


@contextlib.contextmanager
def first_runner(
    should_time: bool, refs: list[tuple[str, Any]], first: int, number: int
) -> Iterator[None]:
    """`timed_encoder_operation` of vLLM's first model runner."""
    yield


@contextlib.contextmanager
def second_runner(request_ids: Any) -> Iterator[None]:
    """`timed_encoder_operation` of its second one."""
    yield


REFS = [("a", 0), ("b", 0), ("b", 9), ("c", 0)]


@pytest.mark.parametrize(
    ("operation", "arguments", "expected"),
    [
        (first_runner, (False, REFS, 0, 4), ["a", "b", "c"]),
        (first_runner, (True, REFS, 1, 2), ["b"]),
        (second_runner, ({"a": [0], "c": [1]}.keys(),), ["a", "c"]),
    ],
)
def test_an_encoder_run_is_timed(
    operation: Callable[..., Any], arguments: tuple[Any, ...], expected: list[str]
) -> None:
    runs: list[EncoderRun] = []
    watched = timed(operation, WallTimer(runs.append))
    before = time.monotonic()
    with watched(*arguments):
        time.sleep(0.01)
    (run,) = runs
    assert run.request_ids == expected
    assert before <= run.start_s < run.end_s - 0.005
    assert run.end_s <= time.monotonic()


def test_an_error_of_the_encoder_is_propagated() -> None:
    runs: list[EncoderRun] = []
    watched = timed(second_runner, WallTimer(runs.append))
    with pytest.raises(KeyError), watched(["a"]):
        raise KeyError
    assert not runs


def test_a_failing_timer_fails_no_step(caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: EncoderRun) -> None:
        raise OSError

    watched = timed(second_runner, WallTimer(fail))
    for _ in range(3):
        with watched(["a"]):
            pass
    assert len(caplog.records) == 1


def test_a_failing_device_fails_no_step(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 1 << 6)  # no machine has so many devices
    watched = timed(second_runner, CudaTimer(device, lambda run: None))
    deadline = time.monotonic() + WAIT_S
    while not caplog.records:
        assert time.monotonic() < deadline
        with watched(["a"]):
            time.sleep(0.01)
    for _ in range(3):
        with watched(["a"]):
            pass
    assert len(caplog.records) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_an_encoder_run_on_a_gpu_is_timed_without_waiting() -> None:
    runs: list[EncoderRun] = []
    watched = timed(second_runner, CudaTimer(torch.device("cuda", 0), runs.append))
    square = torch.ones(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    before = time.monotonic()
    with watched(["a"]):
        for _ in range(20):
            square @ square
    queued = time.monotonic()
    assert not runs  # without waiting for the device
    torch.cuda.synchronize()
    deadline = time.monotonic() + WAIT_S
    while not runs:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (run,) = runs
    assert before - 0.01 < run.start_s < queued < run.end_s < time.monotonic()

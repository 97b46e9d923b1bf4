"""Runs of the vision encoder, as vLLM's worker tells them: line, timers, the real engine."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
import uvloop

from server.engine.arguments import DEMO_MODEL
from server.engine.vllm_adapter.encode_timer import CudaTimer, WallTimer, connected, send, timed
from server.engine.vllm_adapter.encode_timing import EncoderRun, EncodeTimes

VARIABLE = "_SACCADE_ENCODE_TIMES"
WAIT_S = 30


class Runs(list[EncoderRun]):
    """What a server is told."""

    def __call__(self, *run: Any) -> None:
        self.append(EncoderRun(*run))

    async def wait_for(self, number: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self) < number:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_run_reaches_the_server(run: Callable[..., None]) -> None:
    runs, sent = Runs(), [EncoderRun(["a", "b"], 1.5, 2.25), EncoderRun([], 3.0, 3.0)]

    async def check() -> None:
        async with EncodeTimes(runs):
            with connected(os.environ[VARIABLE]) as socket:
                for each in sent:
                    send(socket, each)
                await runs.wait_for(2)

    run(check())
    assert runs == sent
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", b"x" * 100, *map(msgspec.msgpack.encode, ([1, 2, 3], [["a"], 1.0], {"a": 1}))],
)
def test_garbage_is_ignored(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    runs, good = Runs(), EncoderRun(["a"], 1.0, 2.0)

    async def check() -> None:
        async with EncodeTimes(runs):
            with connected(os.environ[VARIABLE]) as socket:
                socket.send(garbage)
                send(socket, good)
                await runs.wait_for(1)

    asyncio.run(check())
    assert runs == [good]
    assert len(caplog.records) == 1


def test_a_failing_callback_does_not_end_the_line() -> None:
    runs = Runs()

    def fail_first(*run: Any) -> None:
        runs(*run)
        if len(runs) == 1:
            raise ValueError

    async def check() -> None:
        async with EncodeTimes(fail_first):
            with connected(os.environ[VARIABLE]) as socket:
                send(socket, EncoderRun(["a"], 1.0, 2.0))
                send(socket, EncoderRun(["b"], 1.0, 2.0))
                await runs.wait_for(2)

    asyncio.run(check())


def test_a_server_that_does_not_listen_holds_nobody_up() -> None:
    """Far more than the sockets hold: the rest is dropped, and what comes later is delivered."""
    runs, last = Runs(), EncoderRun(["last"], 0.0, 0.0)

    async def check() -> None:
        async with EncodeTimes(runs), asyncio.timeout(WAIT_S):
            with connected(os.environ[VARIABLE]) as socket:
                for number in range(20_000):  # the event loop does not get its turn meanwhile
                    send(socket, EncoderRun(["x" * 100], number, number))
                while last not in runs:
                    send(socket, last)
                    await asyncio.sleep(0.01)

    asyncio.run(check())
    assert 0 < runs.index(last) < 20_000


def test_nobody_listens() -> None:
    with connected("ipc:///nonexistent/encoder") as socket:
        for _ in range(20_000):
            send(socket, EncoderRun(["a"], 0.0, 0.0))


@contextlib.contextmanager
def first_runner(
    should_time: bool, refs: list[tuple[str, Any]], first: int, number: int
) -> Iterator[None]:
    """`timed_encoder_operation` of vLLM's first model runner."""
    yield


@contextlib.contextmanager
def second_runner(request_ids: Any) -> Iterator[None]:
    """The same of its second one."""
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
def test_a_run_is_timed(
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


def test_an_error_of_the_encoder_passes() -> None:
    runs: list[EncoderRun] = []
    watched = timed(second_runner, WallTimer(runs.append))
    with pytest.raises(KeyError), watched(["a"]):
        raise KeyError
    assert not runs


def test_a_timer_that_fails_fails_no_step(caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: EncoderRun) -> None:
        raise OSError

    watched = timed(second_runner, WallTimer(fail))
    for _ in range(3):
        with watched(["a"]):
            pass
    assert len(caplog.records) == 1


def test_a_device_that_fails_fails_no_step(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", 1 << 6)  # nowhere are so many
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
def test_a_run_on_a_gpu_is_timed() -> None:
    runs: list[EncoderRun] = []
    watched = timed(second_runner, CudaTimer(torch.device("cuda", 0), runs.append))
    square = torch.ones(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    before = time.monotonic()
    with watched(["a"]):
        for _ in range(20):
            square @ square
    queued = time.monotonic()
    assert not runs  # nobody waited for the device
    torch.cuda.synchronize()
    deadline = time.monotonic() + WAIT_S
    while not runs:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (run,) = runs
    assert before - 0.01 < run.start_s < queued < run.end_s < time.monotonic()


def what_register_does() -> tuple[bool, bool, set[str]]:
    """In a process like those of vLLM: whether it changes the worker, unasked and asked, and which
    of vLLM's modules are imported for it."""
    from vllm.v1.executor import Executor  # noqa: F401  - as every engine process has
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from server.engine.vllm_adapter.encode_timing import register

    before, execute_model = set(sys.modules), WorkerWrapperBase.execute_model
    register()
    unasked = WorkerWrapperBase.execute_model is not execute_model
    os.environ[VARIABLE] = "ipc:///nonexistent/encoder"
    register()
    asked = WorkerWrapperBase.execute_model is not execute_model
    return unasked, asked, set(sys.modules) - before


def test_vllm_is_changed_only_on_request() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(what_register_does) == (False, True, set())


ENGINE = """
import asyncio, io, json, sys
from PIL import Image
from server.engine import torchvision_ops
torchvision_ops.register()
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from server.engine.vllm_adapter.encode_timing import EncodeTimes

PROMPT = "<|im_start|>user\\n{}<|vision_start|><|image_pad|><|vision_end|>" \\
         "What?<|im_end|>\\n<|im_start|>assistant\\n"

async def main():
    runs, ids, asked = [], {}, []
    async with EncodeTimes(lambda *run: runs.append(run)):
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
            model=sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=1024,
            enable_prefix_caching=False))
        send = engine.engine_core.add_request_async

        async def add_request(request):
            ids[request.external_req_id] = request.request_id
            await send(request)

        engine.engine_core.add_request_async = add_request

        async def ask(name, color, text):
            prompt = {"prompt": PROMPT.format(text)}
            if color:
                image = Image.new("RGB", (224, 224), color)
                prompt["multi_modal_data"] = {"image": image}
            else:
                prompt["prompt"] = text
            params = SamplingParams(max_tokens=3, temperature=0)
            async for output in engine.generate(prompt, params, name):
                pass
            times = output.metrics
            asked.append((name, ids[name], times.scheduled_ts, times.first_token_ts))

        await ask("first", "red", "a")
        await asyncio.gather(ask("blue", "blue", "a"), ask("green", "green", "b"))
        await ask("again", "red", "b")
        await ask("text", None, "hello")
        await asyncio.sleep(0.2)
        engine.shutdown()
    print(json.dumps({"runs": runs, "asked": asked}))

asyncio.run(main())
"""


def test_the_real_engine_tells_when_its_encoder_ran() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(DEMO_MODEL)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    asked = {name: times for name, *times in told["asked"]}
    encoded: dict[str, tuple[float, float]] = {}
    for request_ids, start_s, end_s in told["runs"]:
        assert start_s < end_s
        for request_id in request_ids:
            assert request_id not in encoded
            encoded[request_id] = start_s, end_s
    assert set(encoded) == {asked[name][0] for name in ("first", "blue", "green")}
    for request_id, scheduled_s, first_token_s in asked.values():
        if request_id in encoded:
            start_s, end_s = encoded[request_id]
            assert scheduled_s < start_s < end_s < first_token_s

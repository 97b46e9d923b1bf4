"""The pool with real child processes: what goes in comes out, and nothing else breaks."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from server.errors import (
    ImageProcessingFailed,
    ImageProcessingTimeout,
    InvalidImage,
    SaccadeError,
    ServerBusy,
)
from server.settings import ImageSettings
from server.telemetry.stages import Timeline
from server.workers.features import Features
from server.workers.jobs import ProcessJob, encode_kwargs
from server.workers.memory import Segment
from server.workers.pool import ImagePool
from server.workers.worker import WorkerSpec

SPEC = WorkerSpec("tests.extractors:load", b"payload")
JOB = ProcessJob("PNG", (8, 6), kwargs=encode_kwargs({"option": "set"}))


def _numpy(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Any:
    count = int(np.prod(shape))
    return np.frombuffer(buffer, dtype, count, offset).reshape(shape)


def arrays(features: Features) -> dict[str, Any]:
    return features.arrays(_numpy)


@contextlib.asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[ImagePool]:
    async with ImagePool(SPEC, ImageSettings(**{"image_workers": 2, **settings})) as pool:
        yield pool


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(bounded())


def process(pool: ImagePool, key: str, data: bytes) -> Coroutine[Any, Any, Features]:
    return pool.process(key, data, JOB, Timeline(time.monotonic()))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_features_come_back_as_they_were_made() -> None:
    async def test() -> None:
        async with running() as pool:
            for data in (b"x", os.urandom(200_000), b"large 300000", os.urandom(3_000_000)):
                result = await process(pool, str(len(data)), data)
                made = arrays(result)
                assert made["bytes"].tobytes() == data
                assert int(made["floats"][0, 0]) in pool.worker_pids
                assert [int(x) for x in made["list"][0]] == [0, 1, 2]
                assert made["list"][1:] == [7, "text", None]
                assert made["option"] == "set"
                assert result.size == (8, 6)

    run(test)


def test_memory_is_used_again_and_never_while_it_is_read() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            held = [await process(pool, f"h{i}", b"%d" % i) for i in range(6)]
            seats = pool._seats[0].link
            assert seats is not None
            assert len(seats._results) == 6
            for i in range(50):
                data = os.urandom(100_000)
                made = arrays(await process(pool, f"k{i}", data))
                assert made["bytes"].tobytes() == data
                del made
            assert len(seats._results) <= 12
            for i, features in enumerate(held):
                assert arrays(features)["bytes"].tobytes() == b"%d" % i

    run(test)


def test_requests_for_one_key_run_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with running() as pool:
            counter = tmp_path / "count"
            command = f"count {counter}\n".encode()
            results = await asyncio.gather(*(process(pool, "same", command) for _ in range(20)))
            assert counter.read_text() == "x"
            assert len({id(result) for result in results}) == 1
            await process(pool, "same", command)  # not a cache: asked again, run again
            assert counter.read_text() == "xx"

    run(test)


def test_waiting_work_whose_callers_left_is_never_started(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            counter, go = tmp_path / "count", tmp_path / "go"
            command = f"wait-for {go}\n".encode()
            busy = asyncio.create_task(process(pool, "busy", command))
            await asyncio.sleep(0.05)
            left = [
                asyncio.create_task(process(pool, f"k{i}", f"count {counter}\n".encode()))
                for i in range(5)
            ]
            shared = asyncio.create_task(process(pool, "k0", b""))
            await until(lambda: pool.queued == 5)
            for task in left:
                task.cancel()
            await until(lambda: pool.queued == 1)  # k0 still has a caller
            go.touch()
            await asyncio.gather(busy, shared)
            assert counter.read_text() == "x"
            assert pool.queued == 0

    run(test)


def test_a_picture_that_cannot_be_handed_over_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shared memory may run out for a moment; the picture and the pool survive it."""
    create, failures = Segment.create, [OSError("no space")]

    def scarce(nbytes: int) -> Segment:
        if failures:
            raise failures.pop()
        return create(nbytes)

    async def test() -> None:
        async with running() as pool:
            monkeypatch.setattr(Segment, "create", scarce)
            data = os.urandom(500_000)
            made = arrays(await process(pool, "k", data))
            assert made["bytes"].tobytes() == data
            assert not failures
            await until(lambda: len(pool.worker_pids) == 2)

    run(test)


@pytest.mark.parametrize(
    ("command", "error"),
    [(b"refuse", InvalidImage), (b"raise", SaccadeError)],
)
def test_refusals_are_typed_and_leak_nothing(command: bytes, error: type[Exception]) -> None:
    async def test() -> None:
        async with running() as pool:
            pids = sorted(pool.worker_pids)
            with pytest.raises(error) as caught:
                await process(pool, "k", command)
            assert type(caught.value) is error
            assert "/etc" not in str(caught.value)
            assert sorted(pool.worker_pids) == pids

    run(test)


def test_a_killed_worker_costs_nobody_an_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with running() as pool:
            victim = asyncio.create_task(
                process(pool, "v", f"die-once {tmp_path / 'died'}\n".encode())
            )
            others = [process(pool, f"k{i}", b"%d" % i) for i in range(20)]
            results = await asyncio.gather(victim, *others)
            assert len(results) == 21
            await until(lambda: len(pool.worker_pids) == 2)
            assert pool.ready

    run(test)


def test_a_picture_that_kills_every_worker_is_given_up() -> None:
    async def test() -> None:
        async with running() as pool:
            with pytest.raises(ImageProcessingFailed):
                await process(pool, "v", b"die")
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"
            await until(lambda: len(pool.worker_pids) == 2)

    run(test)


def test_a_picture_that_takes_too_long_is_ended() -> None:
    async def test() -> None:
        async with running(image_timeout_s=3) as pool:
            started = time.monotonic()
            with pytest.raises(ImageProcessingTimeout, match="longer than 3 s"):
                await process(pool, "v", b"sleep 60")
            assert time.monotonic() - started < 30
            await process(pool, "k", b"fine")

    run(test)


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(image_workers=1, image_queue=2) as pool:
            go = tmp_path / "go"
            command = f"wait-for {go}\n".encode()
            busy = [asyncio.create_task(process(pool, "k0", command))]
            await asyncio.sleep(0.05)
            busy += [asyncio.create_task(process(pool, f"k{i}", b"")) for i in (1, 2)]
            await until(lambda: pool.queued == 2)
            with pytest.raises(ServerBusy, match="the limit is 2"):
                await process(pool, "k3", b"")
            go.touch()
            await asyncio.gather(*busy)

    run(test)


def test_workers_dying_in_a_row_make_the_pool_unready_until_one_works() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            for i in range(3):
                with pytest.raises((ImageProcessingFailed, ServerBusy)):
                    await process(pool, f"k{i}", b"die")
            await until(lambda: bool(pool.worker_pids))
            assert not pool.ready
            await process(pool, "k", b"fine")
            assert pool.ready

    run(test)


def test_the_pool_heals_when_the_process_it_forks_from_is_killed() -> None:
    async def test() -> None:
        async with running() as pool:
            parent = psutil.Process(pool.worker_pids[0]).ppid()
            os.kill(parent, signal.SIGKILL)  # its children go with it
            await until(lambda: not psutil.pid_exists(parent) or not pool.worker_pids)
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"

    run(test)


def test_no_process_or_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    async def test() -> None:
        async with running() as pool:
            assert len(pool.worker_pids) == 2
            task = asyncio.create_task(process(pool, "k", b"sleep 30"))
            await asyncio.sleep(0.1)
        with pytest.raises(ServerBusy, match="shutting down"):
            await task

    run(test)
    after = {child.pid: child for child in psutil.Process().children(recursive=True)}
    left = [p.cmdline() for pid, p in after.items() if pid not in before]
    assert not [line for line in left if "resource_tracker" not in " ".join(line)]
    assert not list(tmp_path.iterdir())

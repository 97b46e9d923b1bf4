"""The pool with real child processes: what goes in comes out, and nothing else breaks."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from server.errors import (
    ClientError,
    ImageProcessingFailed,
    ImageProcessingTimeout,
    InvalidImage,
    SaccadeError,
    ServerBusy,
)
from server.settings import ImageSettings
from server.workers.features import Features
from server.workers.memory import Segment
from server.workers.pool import ImagePool
from server.workers.worker import WorkerSpec

SPEC = WorkerSpec("tests.extractors:load", b"payload")
OPTIONS = {"option": "set"}


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


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_features_come_back_as_they_were_made() -> None:
    async def test() -> None:
        async with running() as pool:
            for data in (b"x", os.urandom(200_000), b"large 300000", os.urandom(3_000_000)):
                result = await pool.process(str(len(data)), data, OPTIONS)
                made = arrays(result)
                assert made["bytes"].tobytes() == data
                assert int(made["floats"][0, 0]) in pool.worker_pids
                assert [int(x) for x in made["list"][0]] == [0, 1, 2]
                assert made["list"][1:] == [7, "text", None]
                assert made["options"] == "set"
                assert result.size == (8, 6)

    run(test)


def test_memory_is_used_again_and_never_while_it_is_read() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            held = [await pool.process(f"h{i}", b"%d" % i, OPTIONS) for i in range(6)]
            seats = pool._seats[0].link
            assert seats is not None
            assert len(seats._results) == 6
            for i in range(50):
                data = os.urandom(100_000)
                made = arrays(await pool.process(f"k{i}", data, OPTIONS))
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
            results = await asyncio.gather(
                *(pool.process("same", command, OPTIONS) for _ in range(20))
            )
            assert counter.read_text() == "x"
            assert len({id(result) for result in results}) == 1
            await pool.process("same", command, OPTIONS)  # not a cache: asked again, run again
            assert counter.read_text() == "xx"

    run(test)


def test_waiting_work_whose_callers_left_is_never_started(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            counter, go = tmp_path / "count", tmp_path / "go"
            command = f"wait-for {go}\n".encode()
            busy = asyncio.create_task(pool.process("busy", command, OPTIONS))
            await asyncio.sleep(0.05)
            left = [
                asyncio.create_task(pool.process(f"k{i}", f"count {counter}\n".encode(), OPTIONS))
                for i in range(5)
            ]
            shared = asyncio.create_task(pool.process("k0", b"", OPTIONS))
            await until(lambda: pool.queued == 5)
            for task in left:
                task.cancel()
            await until(lambda: pool.queued == 1)  # k0 still has a caller
            go.touch()
            await asyncio.gather(busy, shared)
            assert counter.read_text() == "x"
            assert pool.queued == 0

    run(test)


@pytest.mark.parametrize(
    "options", [{"much": "x" * 300_000}, {"big": 1 << 80}, {"lone": "\ud800"}, {"odd": object()}]
)
def test_options_that_no_message_can_carry(options: dict[str, Any]) -> None:
    async def test() -> None:
        async with running() as pool:
            pids = sorted(pool.worker_pids)
            with pytest.raises(ClientError, match="options"):
                await pool.process("k", b"x", options)
            await pool.process("k", b"x", OPTIONS)
            assert sorted(pool.worker_pids) == pids

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
            made = arrays(await pool.process("k", data, OPTIONS))
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
                await pool.process("k", command, OPTIONS)
            assert type(caught.value) is error
            assert "/etc" not in str(caught.value)
            assert sorted(pool.worker_pids) == pids

    run(test)


def test_a_killed_worker_costs_nobody_an_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with running() as pool:
            victim = asyncio.create_task(
                pool.process("v", f"die-once {tmp_path / 'died'}\n".encode(), OPTIONS)
            )
            others = [pool.process(f"k{i}", b"%d" % i, OPTIONS) for i in range(20)]
            results = await asyncio.gather(victim, *others)
            assert len(results) == 21
            await until(lambda: len(pool.worker_pids) == 2)
            assert pool.ready

    run(test)


def test_a_picture_that_kills_every_worker_is_given_up() -> None:
    async def test() -> None:
        async with running() as pool:
            with pytest.raises(ImageProcessingFailed):
                await pool.process("v", b"die", OPTIONS)
            made = arrays(await pool.process("k", b"fine", OPTIONS))
            assert made["bytes"].tobytes() == b"fine"
            await until(lambda: len(pool.worker_pids) == 2)

    run(test)


def test_a_picture_that_takes_too_long_is_ended() -> None:
    async def test() -> None:
        async with running(image_timeout_s=3) as pool:
            started = time.monotonic()
            with pytest.raises(ImageProcessingTimeout, match="longer than 3 s"):
                await pool.process("v", b"sleep 60", OPTIONS)
            assert time.monotonic() - started < 30
            await pool.process("k", b"fine", OPTIONS)

    run(test)


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(image_workers=1, image_queue=2) as pool:
            go = tmp_path / "go"
            command = f"wait-for {go}\n".encode()
            busy = [asyncio.create_task(pool.process("k0", command, OPTIONS))]
            await asyncio.sleep(0.05)
            busy += [asyncio.create_task(pool.process(f"k{i}", b"", OPTIONS)) for i in (1, 2)]
            await until(lambda: pool.queued == 2)
            with pytest.raises(ServerBusy, match="the limit is 2"):
                await pool.process("k3", b"", OPTIONS)
            go.touch()
            await asyncio.gather(*busy)

    run(test)


def test_workers_dying_in_a_row_make_the_pool_unready_until_one_works() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            for i in range(3):
                with pytest.raises((ImageProcessingFailed, ServerBusy)):
                    await pool.process(f"k{i}", b"die", OPTIONS)
            await until(lambda: bool(pool.worker_pids))
            assert not pool.ready
            await pool.process("k", b"fine", OPTIONS)
            assert pool.ready

    run(test)


def test_the_pool_heals_when_the_process_it_forks_from_is_killed() -> None:
    async def test() -> None:
        async with running() as pool:
            parent = psutil.Process(pool.worker_pids[0]).ppid()
            os.kill(parent, signal.SIGKILL)  # its children go with it
            await until(lambda: not psutil.pid_exists(parent) or not pool.worker_pids)
            made = arrays(await pool.process("k", b"fine", OPTIONS))
            assert made["bytes"].tobytes() == b"fine"

    run(test)


def test_no_process_or_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    async def test() -> None:
        async with running() as pool:
            assert len(pool.worker_pids) == 2
            task = asyncio.create_task(pool.process("k", b"sleep 30", OPTIONS))
            await asyncio.sleep(0.1)
        with pytest.raises(ServerBusy, match="shutting down"):
            await task

    run(test)
    after = {child.pid: child for child in psutil.Process().children(recursive=True)}
    left = [p.cmdline() for pid, p in after.items() if pid not in before]
    assert not [line for line in left if "resource_tracker" not in " ".join(line)]
    assert not list(tmp_path.iterdir())

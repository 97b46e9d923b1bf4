"""The pool with real child processes: results, failures, restarts and leaks."""

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
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
from server.telemetry import metrics
from server.telemetry.stages import Timeline
from server.workers import pool as pools
from server.workers import slots
from server.workers.forkserver import Forkserver, WorkerProcess
from server.workers.jobs import ProcessJob, encode_kwargs
from server.workers.pool import ImagePool
from server.workers.protocol import Features
from server.workers.shared_memory import Segment
from server.workers.worker import WorkerSpec

SPEC = WorkerSpec("tests.extractors:load", b"payload")
JOB = ProcessJob("PNG", (8, 6), kwargs=encode_kwargs({"option": "set"}))


class SharedForkserver(Forkserver):
    """Outlives the pools that use it, because a forkserver takes a second to load libraries."""

    def close(self) -> None:
        """Ignore the `close` of each pool."""

    def stop(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def shared_forkserver() -> Iterator[SharedForkserver]:
    forkserver = SharedForkserver(SPEC)
    yield forkserver
    forkserver.stop()


@pytest.fixture(autouse=True)
def pools_share_a_forkserver(
    shared_forkserver: SharedForkserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "Forkserver", lambda spec: shared_forkserver)


@pytest.fixture
def own_forkserver(
    pools_share_a_forkserver: None,
    shared_forkserver: SharedForkserver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each pool starts and stops its own forkserver, as in the server."""
    shared_forkserver.stop()
    monkeypatch.setattr(pools, "Forkserver", Forkserver)


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


def test_features_are_returned_unchanged() -> None:
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


def test_memory_is_reused_only_after_it_was_read() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            held = [await process(pool, f"h{i}", b"%d" % i) for i in range(6)]
            channel = pool._slots.all[0].channel
            assert channel is not None
            assert len(channel._results) == 6
            for i in range(50):
                data = os.urandom(100_000)
                made = arrays(await process(pool, f"k{i}", data))
                assert made["bytes"].tobytes() == data
                del made
            assert len(channel._results) <= 12
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
            await process(pool, "same", command)  # not a cache: a later request runs again
            assert counter.read_text() == "xx"

    run(test)


def test_queued_work_whose_callers_left_is_never_started(tmp_path: Path) -> None:
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


def test_a_picture_is_retried_after_shared_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shortage may be brief; the picture and the pool survive it."""
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
def test_errors_of_workers_are_typed_and_leak_nothing(
    command: bytes, error: type[Exception]
) -> None:
    async def test() -> None:
        async with running() as pool:
            pids = sorted(pool.worker_pids)
            with pytest.raises(error) as caught:
                await process(pool, "k", command)
            assert type(caught.value) is error
            assert "/etc" not in str(caught.value)
            assert sorted(pool.worker_pids) == pids

    run(test)


def test_images_of_a_killed_worker_are_retried(tmp_path: Path) -> None:
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


def test_a_picture_that_kills_every_worker_fails() -> None:
    async def test() -> None:
        async with running() as pool:
            with pytest.raises(ImageProcessingFailed):
                await process(pool, "v", b"die")
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"
            await until(lambda: len(pool.worker_pids) == 2)

    run(test)


def test_a_picture_that_takes_too_long_is_killed() -> None:
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


def test_repeated_worker_deaths_make_the_pool_unready_until_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "_RESTART_DELAYS_S", (0.0, 0.01))

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


def test_the_pool_recovers_when_its_forkserver_is_killed(own_forkserver: None) -> None:
    async def test() -> None:
        async with running() as pool:
            parent = psutil.Process(pool.worker_pids[0]).ppid()
            os.kill(parent, signal.SIGKILL)  # its children end with it
            await until(lambda: not psutil.pid_exists(parent) or not pool.worker_pids)
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"

    run(test)


def slow_pdf() -> bytes:
    """A page of large overlapping transparent shapes that takes PDFium many seconds."""
    shape = b"0 0 200 200 re 100 100 m 0 200 l 200 200 l 50 0 l h f*\n"
    return one_page_pdf(b"/G gs\n" + shape * 20_000)


def one_page_pdf(content: bytes) -> bytes:
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R"
        b"/Resources<</ExtGState<</G<</ca .5>>>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
    ]
    body = b"%PDF-1.4\n"
    for number, item in enumerate(objects, 1):
        body += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    return body + b"trailer<</Root 1 0 R>>\n%%EOF"


def test_abandoned_slow_work_is_stopped_by_replacing_its_worker() -> None:
    async def test() -> None:
        async with running(image_workers=1, image_timeout_s=600) as pool:
            (pid,) = pool.worker_pids
            deaths, restarts = (
                value(metrics.image_worker_deaths),
                value(metrics.image_worker_restarts),
            )
            slow = asyncio.create_task(process(pool, "slow", b"render pdf\n" + slow_pdf()))
            await until(lambda: pool._slots.all[0].task is not None)
            slow.cancel()
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"
            assert pool.worker_pids != [pid]
            assert pool.ready
            assert value(metrics.image_worker_deaths) == deaths
            assert value(metrics.image_worker_restarts) == restarts + 1
            assert pool._slots.health.restart_delay_s == 0

    run(test)


def value(counter: Any) -> float:
    found: float = counter._value.get()
    return found


def test_quick_abandoned_work_keeps_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "ABANDONED_GRACE_S", 60.0)

    async def test() -> None:
        async with running(image_workers=1, image_timeout_s=600) as pool:
            pids, go = pool.worker_pids, tmp_path / "go"
            left = asyncio.create_task(process(pool, "left", f"wait-for {go}\n".encode()))
            await until(lambda: pool._slots.all[0].task is not None)
            left.cancel()
            go.touch()
            await process(pool, "k", b"fine")
            assert pool.worker_pids == pids

    run(test)


def test_a_worker_whose_start_fails_is_restarted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, failures = Forkserver.start, [RuntimeError("no threads"), ValueError("odd")]

    def failing(self: Forkserver, name: str) -> WorkerProcess:
        if failures:
            raise failures.pop()
        return start(self, name)

    async def test() -> None:
        async with running(image_workers=1) as pool:
            (pid,) = pool.worker_pids
            monkeypatch.setattr(Forkserver, "start", failing)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not failures and len(pool.worker_pids) == 1)
            await process(pool, "k", b"fine")
            assert caplog.text.count("failed to start image worker") == 2

    run(test)


def test_a_result_too_large_for_a_message_leaks_no_memory() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            (pid,) = pool.worker_pids
            for i in range(12):
                with pytest.raises(SaccadeError, match="too many"):
                    await process(pool, f"k{i}", b"too-long")
            await process(pool, "k", b"fine")
            assert pool.worker_pids == [pid]
            maps = [found.path for found in psutil.Process(pid).memory_maps(grouped=False)]
            assert sum("memfd:saccade-image" in path for path in maps) == 1

    run(test)


@pytest.mark.parametrize(
    "kind",
    ["garbage", "other-job", "unknown-segment", "unknown-dropped", "no-descriptor", "too-small",
     "no-memory"],
)  # fmt: skip
def test_a_worker_that_breaks_the_protocol_is_replaced(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with running(image_workers=1, image_timeout_s=600) as pool:
            await process(pool, "before", b"fine")
            (pid,) = pool.worker_pids
            gc.collect()
            fds = len(os.listdir("/proc/self/fd"))
            command = f"rogue {kind} {pool._next_id + 1}\n".encode()
            with pytest.raises(ImageProcessingFailed):
                await process(pool, "v", command)
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"
            assert pool.worker_pids != [pid]
            del made
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) == fds
            assert f"image worker {pid} violated the protocol" in caplog.text

    run(test)


def test_a_descriptor_is_not_closed_while_a_picture_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise its number could be reused by another connection, which would get the picture."""
    create, begun, go = Segment.create, threading.Event(), threading.Event()

    def waiting(nbytes: int) -> Segment:
        begun.set()
        go.wait()
        return create(nbytes)

    async def test() -> None:
        async with running(image_workers=1) as pool:
            channel = pool._slots.all[0].channel
            assert channel is not None
            monkeypatch.setattr(Segment, "create", waiting)
            sent = asyncio.create_task(process(pool, "k", os.urandom(500_000)))
            try:
                await until(begun.is_set)
                os.kill(channel.pid, signal.SIGKILL)
                await until(lambda: pool._slots.all[0].channel is not channel)
                assert channel._connection.fileno() >= 0
            finally:
                go.set()
            await sent
            assert channel._connection.fileno() == -1

    run(test)


def test_a_stopped_pool_has_closed_all_descriptors(own_forkserver: None) -> None:
    async def use() -> None:
        async with running() as pool:
            os.kill(pool.worker_pids[0], signal.SIGKILL)
            await process(pool, "k", os.urandom(500_000))
            left = asyncio.create_task(process(pool, "left", b"sleep 60"))
            await asyncio.sleep(0)
            left.cancel()

    run(use)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    run(use)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stopped_pool_has_ended_its_processes_and_removed_its_files(
    own_forkserver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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

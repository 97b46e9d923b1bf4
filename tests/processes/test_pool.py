"""The pool with real child processes: results, failures, restarts and leaks."""

import asyncio
import contextlib
import gc
import os
import select
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from server.errors import (
    ImageFrameMissing,
    ImageProcessingFailed,
    ImageProcessingTimeout,
    ImageQueueFull,
    InvalidImage,
    PdfTooComplex,
    SaccadeError,
    ServerBusy,
    WorkerLost,
)
from server.settings import ImageSettings
from server.telemetry import metrics
from server.telemetry.record import Record
from server.telemetry.stages import Stage
from server.workers import pool as pools
from server.workers import slots
from server.workers.channel import WorkerChannel
from server.workers.forkserver import Forkserver, WorkerProcess
from server.workers.jobs import ProcessJob, encode_kwargs
from server.workers.pool import ImagePool
from server.workers.protocol import Features
from server.workers.shared_memory import Segment
from server.workers.worker import WorkerSpec
from tests import hostile_pdfs, media
from tests.extractors import HELD
from tests.forked import SharedForkserver
from tests.scarce_files import no_free_files

# Commands of these tests read and write files.
SPEC = WorkerSpec("tests.extractors:load", b"payload", pdf_page_timeout_s=0.4, sandbox="off")
JOB = ProcessJob("PNG", (8, 6), kwargs=encode_kwargs({"option": "set"}))


@pytest.fixture(scope="module")
def shared_forkserver() -> Iterator[SharedForkserver]:
    shared = SharedForkserver(SPEC)
    yield shared
    shared.stop()


@pytest.fixture(autouse=True)
def pools_share_a_forkserver(
    shared_forkserver: SharedForkserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "Forkserver", lambda spec: shared_forkserver)
    # A pool whose forkserver dies starts a new one in a thread, with which that one ends.
    shared_forkserver.preload()


@pytest.fixture
def own_forkserver(pools_share_a_forkserver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pool starts and stops its own forkserver, as in the server."""
    monkeypatch.setattr(pools, "Forkserver", Forkserver)


def _numpy(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Any:
    count = int(np.prod(shape))
    return np.frombuffer(buffer, dtype, count, offset).reshape(shape)


def arrays(features: Features) -> dict[str, Any]:
    return features.arrays(_numpy)


@contextlib.asynccontextmanager
async def running(*, group_share: float = 1.0, **settings: Any) -> AsyncIterator[ImagePool]:
    chosen = ImageSettings(**{"image_workers": 2, **settings})
    async with ImagePool(SPEC, chosen, group_share=group_share) as pool:
        yield pool


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(bounded())


def process(pool: ImagePool, key: str, data: bytes) -> Coroutine[Any, Any, Features]:
    return pool.process(key, data, JOB, Record())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


PAGE = ProcessJob("PDF", (612, 792))
_SLOW_PAGES = {
    "nested forms": hostile_pdfs.nested_forms(),
    "a form that draws itself": hostile_pdfs.odd()["form that draws itself"],
    "tiny tiles": hostile_pdfs.tiny_tiles(),
    "many shadings": hostile_pdfs.many_shadings(),
    "content of 2 GB": hostile_pdfs.packed_content(),
}


@pytest.mark.parametrize("name", _SLOW_PAGES)
def test_a_page_that_takes_too_much_work_is_refused_and_its_worker_replaced(name: str) -> None:
    async def test() -> None:
        async with running(image_workers=1, image_timeout_s=60) as pool:
            (pid,) = pool.worker_pids
            deaths = value(metrics.image_worker_deaths)
            began = Record()
            page = pool.process("page", _SLOW_PAGES[name], PAGE, began)
            await asyncio.gather(_refused_as_too_complex(page), process(pool, "k", b"fine"))
            assert pid not in pool.worker_pids
            assert pool.ready
            assert value(metrics.image_worker_deaths) == deaths

    run(test)


async def _refused_as_too_complex(page: Coroutine[Any, Any, Features]) -> None:
    with pytest.raises(PdfTooComplex, match="too complex"):
        await page


def _frames(pool: ImagePool, data: bytes, *frames: int) -> list[Coroutine[Any, Any, Features]]:
    return [
        pool.process(f"frame {n}", data, ProcessJob("GIF", (40, 30), n), Record()) for n in frames
    ]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of jobs in each request to a worker."""
    counts: list[int] = []
    send = WorkerChannel.send_inline

    def counted(channel: WorkerChannel, first_id: int, data: bytes, jobs: Sequence[bytes]) -> None:
        counts.append(len(jobs))
        send(channel, first_id, data, jobs)

    monkeypatch.setattr(WorkerChannel, "send_inline", counted)
    return counts


def test_the_frames_of_an_animation_are_decoded_in_two_passes_by_one_worker(
    requests: list[int],
) -> None:
    data = media.gif(20)
    order = (0, 19, 3, 11, 7, 2, 18)

    async def test() -> None:
        async with running(image_workers=2) as pool:
            found = [arrays(f) for f in await asyncio.gather(*_frames(pool, data, *order))]
            assert [int(made["pixel"][0]) for made in found] == [n * 10 for n in order]
            assert len({made["pid"] for made in found}) == 1

    run(test)
    assert requests == [1, len(order) - 1]


def test_other_pictures_do_not_wait_for_an_animation() -> None:
    async def test() -> None:
        async with running(image_workers=2) as pool:
            frames = asyncio.gather(*_frames(pool, media.gif(20), *range(20)))
            await process(pool, "k", b"fine")
            await frames

    run(test)


def test_the_pictures_of_one_group_do_not_wait_for_the_queue_of_another() -> None:
    async def test() -> None:
        async with running(image_workers=2) as pool:
            done: list[str] = []

            async def one(group: str, number: int) -> None:
                key, record = f"{group} {number}", Record(key_group=group)
                data = b"sleep 0.1" + b"0" * number
                await pool.process(key, data, JOB, record)
                done.append(group)

            heavy = [asyncio.create_task(one("heavy", number)) for number in range(20)]
            await asyncio.sleep(0.05)
            await asyncio.gather(*(one("light", number) for number in range(2)))
            assert len(done) <= 8
            await asyncio.gather(*heavy)

    run(test)


def test_a_group_holds_only_its_share_of_the_workers_while_another_is_active() -> None:
    async def test() -> None:
        async with running(group_share=0.5, image_workers=2) as pool:

            def begin(group: str, name: str, seconds: float) -> asyncio.Task[Features]:
                data = f"sleep {seconds}".encode()
                return asyncio.create_task(
                    pool.process(f"{group} {name}", data, JOB, Record(key_group=group))
                )

            alone = [begin("heavy", f"alone {number}", 0.2) for number in range(3)]
            await until(lambda: pool.queued == 1)  # two are in the workers
            await asyncio.gather(*alone)
            await begin("light", "first", 0)
            heavy = [begin("heavy", f"slow {number}", 60) for number in range(3)]
            await until(lambda: pool.queued == 2)
            await begin("light", "next", 0)  # at once, by the other worker
            assert pool.queued == 2
            for each in heavy:
                each.cancel()
            await asyncio.gather(*heavy, return_exceptions=True)

    run(test)


def test_frames_behind_a_missing_or_damaged_one_fail_alike() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            found = await asyncio.gather(
                *_frames(pool, media.gif(5), 0, 1, 4, 5, 6), return_exceptions=True
            )
            assert all(isinstance(each, Features) for each in found[:3])
            assert all(isinstance(each, ImageFrameMissing) for each in found[3:])
            assert len(pool.worker_pids) == 1

    run(test)


def test_frames_of_a_killed_worker_are_decoded_by_another() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            stopper = asyncio.create_task(process(pool, "s", b"sleep 0.3"))
            await until(lambda: pool._slots.all[0].task is not None)
            frames = asyncio.gather(*_frames(pool, media.gif(20), *range(20)))
            await stopper
            os.kill(pool.worker_pids[0], signal.SIGKILL)
            found = [arrays(each) for each in await frames]
            assert [int(made["pixel"][0]) for made in found] == [n * 10 for n in range(20)]

    run(test)


def test_abandoned_frames_end_with_the_last_caller(requests: list[int]) -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            blocker = asyncio.create_task(process(pool, "s", b"sleep 0.2"))
            await until(lambda: pool._slots.all[0].task is not None)
            frames = [asyncio.create_task(c) for c in _frames(pool, media.gif(20), *range(20))]
            await asyncio.sleep(0)
            for frame in frames[:-1]:
                frame.cancel()
            await blocker
            assert int(arrays(await frames[-1])["pixel"][0]) == 190

    run(test)
    assert requests == [1, 1]


def test_pages_of_usual_work_keep_their_worker() -> None:
    async def test() -> None:
        async with running(image_workers=1) as pool:
            pids = pool.worker_pids
            for number in range(20):
                page = hostile_pdfs.page(content=b"0 0 %d 40 re f" % number)
                job = ProcessJob("PDF", (200, 160))
                await pool.process(f"page {number}", page, job, Record())
            assert pool.worker_pids == pids

    run(test)


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


def test_a_picture_goes_to_the_idle_worker_that_worked_last(tmp_path: Path) -> None:
    async def test() -> None:
        async with running() as pool:
            ends = [tmp_path / "first", tmp_path / "second"]
            for order in (ends, ends[::-1]):
                commands = [f"wait-for {end}\n".encode() for end in ends]
                work = {
                    end: asyncio.create_task(process(pool, end.name, command))
                    for end, command in zip(ends, commands, strict=True)
                }
                await until(lambda: all(slot.task for slot in pool._slots.all))
                for end in order:
                    end.touch()
                    last = arrays(await work[end])["floats"][0, 0]
                assert arrays(await process(pool, "next", b"x"))["floats"][0, 0] == last
                for end in ends:
                    end.unlink()

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


def test_a_picture_whose_workers_are_killed_by_others_is_not_refused() -> None:
    async def test() -> None:
        async with running() as pool:
            for number in (signal.SIGKILL, signal.SIGTERM):
                with pytest.raises(WorkerLost) as lost:
                    await process(pool, "v", f"signal {number:d}".encode())
                assert lost.value.status == 503
                assert lost.value.retry_after_s is not None

    run(test)


def test_a_picture_whose_result_finds_no_free_file_is_not_refused() -> None:
    async def test() -> None:
        async with running() as pool:
            with no_free_files(), contextlib.suppress(WorkerLost, ServerBusy):
                await process(pool, "k", b"fine")  # the end of the first worker may free some
            await until(lambda: bool(pool.worker_pids))
            assert arrays(await process(pool, "k", b"fine"))["bytes"].tobytes() == b"fine"

    run(test)


def test_a_picture_whose_worker_stops_is_processed_by_another(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(image_timeout_s=1) as pool:
            made = arrays(await process(pool, "v", f"stop-once {tmp_path / 'stopped'}".encode()))
            assert made["option"] == "set"
            with pytest.raises(WorkerLost):
                await process(pool, "v", f"signal {signal.SIGSTOP:d}".encode())

    run(test)


def test_the_end_of_the_forkserver_and_its_workers_does_not_refuse_a_picture(
    own_forkserver: None, tmp_path: Path
) -> None:
    go = tmp_path / "go"

    async def test() -> None:
        async with running() as pool:
            task = asyncio.create_task(process(pool, "v", f"wait-for {go}".encode()))
            await until(lambda: any(slot.task for slot in pool._slots.all))
            pids = pool.worker_pids
            forkserver = psutil.Process(pids[0]).parent()
            assert forkserver is not None
            forkserver.kill()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            go.touch()
            assert arrays(await task)["option"] == "set"

    run(test)


def test_a_picture_that_takes_too_long_is_killed() -> None:
    async def test() -> None:
        async with running(image_timeout_s=3) as pool:
            started = time.monotonic()
            with pytest.raises(ImageProcessingTimeout, match="longer than 3 s"):
                await process(pool, "v", b"work")
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
            with pytest.raises(ImageQueueFull, match="the limit is 2"):
                await process(pool, "k3", b"")
            go.touch()
            await asyncio.gather(*busy)

    run(test)


def test_pictures_wait_while_those_in_the_workers_have_too_many_pixels(tmp_path: Path) -> None:
    def picture(pool: ImagePool, key: str, side: int, file: str) -> Any:
        job = ProcessJob("PNG", (side, side))
        work = pool.process(key, f"wait-for {tmp_path / file}".encode(), job, Record())
        return asyncio.ensure_future(work)

    async def test() -> None:
        async with running(image_workers=3, max_decode_pixels=100) as pool:
            first, second = (picture(pool, f"small {n}", 7, "go") for n in range(2))
            third = picture(pool, "third", 7, "go")
            alone = picture(pool, "larger than the limit", 11, "go")
            await asyncio.sleep(0.2)
            assert (pool.decode_pixels, pool.queued) == (98, 2)
            (tmp_path / "go").touch()
            await asyncio.gather(first, second, third, alone)
            assert (pool.decode_pixels, pool.queued) == (0, 0)

    run(test)


def test_repeated_worker_deaths_make_the_pool_unready_until_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "_RESTART_DELAYS_S", (0.0, 0.01))

    async def test() -> None:
        async with running(image_workers=1) as pool:
            for i in range(3):
                with pytest.raises((ImageProcessingFailed, WorkerLost)):
                    await process(pool, f"k{i}", b"die")
            await until(lambda: bool(pool.worker_pids))
            assert not pool.ready
            await process(pool, "k", b"fine")
            assert pool.ready

    run(test)


def test_the_pool_recovers_when_its_forkserver_is_killed() -> None:
    async def test() -> None:
        async with running() as pool:
            parent = psutil.Process(pool.worker_pids[0]).ppid()
            os.kill(parent, signal.SIGKILL)  # its children end with it
            await until(lambda: not psutil.pid_exists(parent) or not pool.worker_pids)
            made = arrays(await process(pool, "k", b"fine"))
            assert made["bytes"].tobytes() == b"fine"

    run(test)


def _held(path: Path, data: bytes = b"") -> bytes:
    return data + HELD + os.fsencode(path)


def _work_in(stage: str, pool: ImagePool, path: Path) -> list[Awaitable[Any]]:
    """Work that waits for the file `path` in a stage."""
    if stage == "decoding":  # and one picture is queued
        return [process(pool, f"{stage} {n}", _held(path, b"%d" % n)) for n in range(3)]
    if stage == "returning":
        return [process(pool, stage, b"hold-result " + os.fsencode(path))]
    if stage == "frames":
        return list(_frames(pool, _held(path, media.gif(6)), *range(6)))
    page = ProcessJob("PDF", (200, 160))
    data = _held(path, hostile_pdfs.page(content=b"0 0 9 40 re f"))
    return [pool.process(stage, data, page, Record())]


async def _kill(pool: ImagePool, victims: str) -> None:
    """Kill the worker that has a task, or all of them, or their forkserver, with which they end."""
    workers = pool.worker_pids
    if victims == "one worker":
        workers = [slot.channel.pid for slot in pool._slots.all if slot.task and slot.channel][:1]
    killed = [psutil.Process(workers[0]).ppid()] if victims == "the forkserver" else workers
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not set(workers) & set(pool.worker_pids))


@pytest.mark.parametrize("victims", ["one worker", "all workers", "the forkserver"])
def test_a_kill_in_any_stage_costs_no_result(
    victims: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_SETTLE_S", 1.0)  # a killed process may be slow to end

    async def test() -> None:
        async with running() as pool:
            for stage in ("decoding", "returning", "frames", "page"):
                path = tmp_path / stage
                work = asyncio.gather(*_work_in(stage, pool, path))
                await until(path.with_suffix(".begun").exists)
                await _kill(pool, victims)
                path.touch()
                assert all(isinstance(each, Features) for each in await work)
                await until(lambda: len(pool.worker_pids) == 2)
            assert pool.ready

    run(test)


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_pdf_whose_inspection_is_killed_is_inspected_again(frozen: int) -> None:
    async def test() -> None:
        async with running(image_workers=frozen) as pool:
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGSTOP)  # so that it has the job and has not begun it
            work = asyncio.create_task(pool.inspect_pdf(one_page_pdf(b""), 9, Record()))
            await until(lambda: any(slot.task for slot in pool._slots.all))
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGKILL)
            assert await work == ([(200.0, 200.0)], 1)

    run(test)


def test_a_result_that_was_sent_is_not_lost_with_its_worker(tmp_path: Path) -> None:
    counter = tmp_path / "count"

    async def test() -> None:
        async with running(image_workers=1) as pool:
            (pid,) = pool.worker_pids
            work = asyncio.create_task(process(pool, "k", f"count {counter}\n".encode()))
            await asyncio.sleep(0)
            assert pool._slots.all[0].task is not None
            channel = pool._slots.all[0].channel
            assert channel is not None
            assert select.select([channel._connection], (), (), 60)[0]  # it is not read meanwhile
            os.kill(pid, signal.SIGKILL)
            assert arrays(await work)["option"] == "set"
            await until(lambda: pool.worker_pids not in ([], [pid]))
            assert counter.read_text() == "x"

    run(test)


def test_workers_that_die_together_do_not_make_the_pool_unhealthy() -> None:
    """One event may end all workers of a large machine."""

    async def test() -> None:
        async with running(image_workers=8) as pool:
            await _kill(pool, "all workers")
            assert arrays(await process(pool, "k", b"fine"))["option"] == "set"
            await _kill(pool, "all workers")
            await until(lambda: len(pool.worker_pids) == 8)
            assert pool.ready

    run(test)


def test_pictures_get_a_503_while_workers_die_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "_RESTART_DELAYS_S", (0.0, 0.01))
    start = Forkserver.start

    def dying(self: Forkserver) -> WorkerProcess:
        started = start(self)
        started.kill()
        return started

    async def test() -> None:
        async with running() as pool:
            monkeypatch.setattr(Forkserver, "start", dying)
            await _kill(pool, "all workers")
            message = ""
            while "die again and again" not in message:
                with pytest.raises(WorkerLost) as lost:
                    await process(pool, "k", b"fine")
                assert lost.value.retry_after_s is not None
                message = lost.value.message
            assert not pool.ready
            monkeypatch.setattr(Forkserver, "start", start)
            await until(lambda: len(pool.worker_pids) == 2)
            await process(pool, "k", b"fine")
            assert pool.ready

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


def test_work_is_abandoned_while_the_processor_runs(tmp_path: Path) -> None:
    decoded, never = tmp_path / "decoded", tmp_path / "never"
    picture = b"wait-for " + bytes(never) + HELD + bytes(decoded)

    async def check() -> None:
        async with running(image_workers=1) as pool:
            (worker,) = pool.worker_pids
            record = Record()
            work = asyncio.create_task(pool.process("a", picture, JOB, record))
            await until(decoded.with_suffix(".begun").exists)
            assert record.timeline.stage() is Stage.DECODE
            await asyncio.sleep(0.1)
            decoded.touch()
            await until(lambda: record.timeline.stage() is Stage.PREPROCESS)
            work.cancel()
            await until(lambda: pool.worker_pids not in ([], [worker]))
            assert not psutil.pid_exists(worker)
            assert pool.decode_pixels == 0
            await process(pool, "b", b"fine")

    run(check)


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

    def failing(self: Forkserver) -> WorkerProcess:
        if failures:
            raise failures.pop()
        return start(self)

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

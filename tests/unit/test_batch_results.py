"""The logs of results: each request once, whatever happened to the files."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from server.batches.results import Response, Result, Results, request_id
from server.batches.usage import Usage
from server.errors import FileStorageFailed

BATCH = "batch_" + "ab" * 16


def result(number: int, text: str = "", status: int = 200) -> Result:
    name = request_id(BATCH, number)
    body = msgspec.Raw(msgspec.json.encode({"text": text}))
    return Result(name, f"item-{number}", Response(status, name, body))


@contextlib.asynccontextmanager
async def opened(folder: Path, total: int = 100) -> AsyncIterator[Results]:
    results = Results(folder, BATCH, total)
    results.open()
    try:
        yield results
    finally:
        await results.settle()
        results.close()


def done(results: Results) -> list[int]:
    return [number for number in range(100) if results.is_done(number)]


def in_file(path: Path) -> list[Result]:
    return [msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines()]


def written(folder: Path, numbers: range) -> Path:
    """The log of answers, with these results."""

    async def run() -> Path:
        async with opened(folder) as results:
            await asyncio.gather(*(results.append(n, result(n, "x" * n)) for n in numbers))
            return results.answers.path

    return asyncio.run(run())


def test_answers_and_errors_are_kept_apart(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as results:
            for number, status in enumerate((200, 404, 500, 200)):
                await results.append(number, result(number, status=status))
            await results.append(4, Result(request_id(BATCH, 4), "item-4", None, {"code": "x"}))
        async with opened(tmp_path) as results:
            assert (results.answers.lines, results.errors.lines) == (2, 3)
            assert done(results) == [0, 1, 2, 3, 4]
            assert [each.custom_id for each in in_file(results.answers.path)] == [
                "item-0",
                "item-3",
            ]

    asyncio.run(run())


def test_a_body_with_line_breaks_is_one_line(tmp_path: Path) -> None:
    async def run() -> None:
        name = request_id(BATCH, 0)
        async with opened(tmp_path) as results:
            body = msgspec.Raw(b'{\n "text":\r\n "a\\nb"\n}')
            await results.append(0, Result(name, "item", Response(200, name, body)))
            (found,) = in_file(results.answers.path)
            assert found.response is not None
            assert msgspec.json.decode(found.response.body) == {"text": "a\nb"}

    asyncio.run(run())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text[:-20],
        lambda text: text + b'{"id":"batch_req',
        lambda text: text + bytes(5000),
        lambda text: text + b'{"id":"other"}\n',
        lambda text: text + text.splitlines(keepends=True)[0],  # a request that has one already
        lambda text: text + text.splitlines(keepends=True)[-1].replace(b"00000009", b"ffffffff"),
        lambda text: text + b"[" * 5000 + b"\n",
    ],
)
def test_a_damaged_end_is_cut_off(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = written(tmp_path, range(10))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))

    async def run() -> None:
        async with opened(tmp_path) as results:
            kept = done(results)
            assert kept in (list(range(9)), list(range(10)))
            for number in set(range(12)) - set(kept):
                await results.append(number, result(number, "x" * number))

    asyncio.run(run())
    found = in_file(path)
    assert sorted(each.id for each in found) == [request_id(BATCH, n) for n in range(12)]
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:9]))


def test_what_failed_to_be_written_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of a line."""
    pwrite = os.pwrite
    fails = [True]

    def full(fd: int, data: bytes, at: int) -> int:
        if not fails:
            return pwrite(fd, data, at)
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "full")
        return pwrite(fd, data[:50], at)

    async def run() -> None:
        async with opened(tmp_path) as results:
            monkeypatch.setattr(os, "pwrite", full)
            for number in range(3):
                with pytest.raises(FileStorageFailed):
                    await results.append(number, result(number, "x" * 200))
            assert done(results) == []
            fails.clear()
            await results.append(1, result(1))
            await results.append(2, result(2, "y" * 20))
            assert done(results) == [1, 2]
            assert [each.custom_id for each in in_file(results.answers.path)] == [
                "item-1",
                "item-2",
            ]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "usage", "models"),
    [
        (
            {
                "model": "m",
                "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
            },
            Usage(5, 0, 2, 0, 7),
            {"m"},
        ),
        (  # embeddings
            {"model": "m", "usage": {"prompt_tokens": 5, "total_tokens": 5}, "data": [1.5]},
            Usage(5, 0, 0, 0, 5),
            {"m"},
        ),
        (  # responses
            {
                "model": "m",
                "usage": {
                    "input_tokens": 5,
                    "input_tokens_details": {"cached_tokens": 4, "image_tokens": 3},
                    "output_tokens": 2,
                    "output_tokens_details": {"reasoning_tokens": 1},
                    "total_tokens": 7,
                },
            },
            Usage(5, 4, 2, 1, 7),
            {"m"},
        ),
        (
            {"model": "m", "usage": {"prompt_tokens": 5, "prompt_tokens_details": None}},
            Usage(input_tokens=5),
            {"m"},
        ),
        ({"usage": None}, Usage(), set()),
        ({"model": "m", "usage": {"prompt_tokens": "5"}}, Usage(), set()),
        ([1], Usage(), set()),
    ],
)
def test_the_usage_of_answers_is_counted_when_they_come_and_when_they_are_read(
    tmp_path: Path, body: object, usage: Usage, models: set[str]
) -> None:
    async def run() -> None:
        raw = msgspec.Raw(msgspec.json.encode(body))
        async with opened(tmp_path) as results:
            for number in range(2):
                name = request_id(BATCH, number)
                await results.append(number, Result(name, "item", Response(200, name, raw)))
            assert (results.answers.usage, results.answers.models) == (usage + usage, models)
        async with opened(tmp_path) as results:
            assert (results.answers.usage, results.answers.models) == (usage + usage, models)

    asyncio.run(run())


def test_a_result_whose_writer_is_cancelled_counts(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as results:
            task = asyncio.create_task(results.append(0, result(0)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await results.settle()
            assert done(results) == [0]
            assert len(in_file(results.answers.path)) == 1

    asyncio.run(run())

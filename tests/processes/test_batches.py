"""Batches without an engine: the routes, their files and their way through the layers of the app,
in processes that are killed."""

import asyncio
import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from server.batches import runner as runner_module
from server.batches.lines import Item, LineLimits, scan
from server.batches.store import BatchStore
from server.errors import ServerBusy
from server.http import batches, errors, files
from server.http.body import BodyReader
from server.http.byte_budget import ByteBudget
from server.http.keys import ApiKeys, KeyRing
from server.http.observe import Observed
from server.ingest.files import FileStore, Quota
from server.request.admission import Admission
from server.settings import HttpSettings
from tests.admission import limits
from tests.media import reader

PATH = "/v1/completions"
KEYS = {
    "groups": {
        "a": ["sk-a"],
        "b": {"keys": ["sk-b"], "concurrency": 1, "requests_per_minute": 4, "priority": 3},
    }
}
A, B = ({"Authorization": f"Bearer sk-{group}"} for group in ("a", "b"))
SLOTS = 8


@dataclass
class Model:
    """Answers prompts in the place of the engine, after `seconds` and one by one past `gate`; notes
    what it was asked."""

    seconds: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    refusals: int = 0
    cancels: int = 0
    gate: asyncio.Semaphore | None = None

    async def __call__(self, raw_request: Request) -> JSONResponse:
        body = await raw_request.json()
        self.asked.append({"headers": dict(raw_request.headers), **body})
        if self.refusals:
            self.refusals -= 1
            raise ServerBusy("busy")
        if self.cancels:
            self.cancels -= 1
            raise asyncio.CancelledError
        if body["prompt"] == "bad":
            return JSONResponse({"error": {"message": "bad prompt", "code": "bad"}}, 400)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
            if self.gate is not None:
                await self.gate.acquire()
        finally:
            self.running -= 1
        answer = {"text": body["prompt"], "process": os.getpid()}
        return JSONResponse({**answer, "model": body.get("model", "tiny"), "usage": _usage(body)})

    def open(self) -> None:
        """Let everything pass the gate from now on."""
        assert self.gate is not None
        for _ in range(10_000):
            self.gate.release()


def _usage(body: dict[str, Any]) -> dict[str, Any]:
    """As of a chat, whose prompt has a token for each character and is half cached."""
    size = len(body["prompt"])
    return {
        "prompt_tokens": size,
        "prompt_tokens_details": {"cached_tokens": size // 2},
        "completion_tokens": 3,
        "completion_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": size + 3,
    }


def total_usage(prompts: list[str]) -> dict[str, Any]:
    """What a batch shows when these prompts are answered."""
    sizes = [len(prompt) for prompt in prompts]
    return {
        "input_tokens": sum(sizes),
        "input_tokens_details": {"cached_tokens": sum(size // 2 for size in sizes)},
        "output_tokens": 3 * len(sizes),
        "output_tokens_details": {"reasoning_tokens": 2 * len(sizes)},
        "total_tokens": sum(sizes) + 3 * len(sizes),
    }


@dataclass
class Parts:
    """A server without an engine and without a port."""

    web: httpx.AsyncClient
    app: FastAPI
    admission: Admission
    runner: runner_module.BatchRunner
    files: FileStore


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    model: Model,
    *,
    with_keys: bool = False,
    max_bytes: int | None = None,
    group_count: int = 3,
    group_items: int = 5000,
    engine_requests: int | None = None,
) -> AsyncIterator[Parts]:
    """The routes of files, of batches and of `model`, behind the layers of the server."""
    keys_file = folder / "keys.json"
    keys_file.write_text(json.dumps(KEYS))
    ring = KeyRing(keys_file if with_keys else None, [], None)
    bounds = limits(running=SLOTS, in_engine=SLOTS, engine_requests=engine_requests)
    admission = Admission(bounds)
    app = FastAPI()
    app.state.draining = False
    app.state.max_batch_bytes = 1 << 20
    app.include_router(files.router)
    app.include_router(batches.router)
    app.post(PATH)(model.__call__)
    errors.add_error_handlers(app)
    app.add_middleware(
        BodyReader,
        settings=HttpSettings(),
        reader=reader(),
        loader=None,
        retained=None,
        limits={},
        budget=ByteBudget(64 << 20, 10),
        parsed=(),
        admission=admission,
        admitted=[PATH],
    )
    if with_keys:
        app.add_middleware(ApiKeys, ring=ring, guarded=("/v1",), priority_header=b"x-priority")
    outer = Observed(app, server_timing=False, log_requests=False, traced=False, aborted=[PATH])
    client = batches.InnerClient(outer, None, b"x-priority")
    async with FileStore(folder / "files", Quota(), Quota(max_bytes), None) as store:
        app.state.files = store
        work = runner_module.BatchRunner(
            BatchStore(store, group_count, group_items),
            lambda batch: batches.GroupAsking(client, admission, ring, app.state, batch.group),
            frozenset({PATH}),
            LineLimits(2000, 10_000),
        )
        async with work:
            app.state.batches = work
            transport = httpx.ASGITransport(outer, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                yield Parts(web, app, admission, work, store)


def lines(count: int, prompt: Callable[[int], str] = lambda n: f"prompt {n}") -> bytes:
    return b"".join(
        json.dumps(
            {
                "custom_id": f"item-{n}",
                "method": "POST",
                "url": PATH,
                "body": {"prompt": prompt(n)},
            }
        ).encode()
        + b"\n"
        for n in range(count)
    )


async def upload(web: httpx.AsyncClient, text: bytes, **more: Any) -> str:
    answer = await web.post(
        "/v1/files", files={"file": ("in.jsonl", text)}, data={"purpose": "batch"}, **more
    )
    assert answer.status_code == 200, answer.text
    file_id: str = answer.json()["id"]
    return file_id


async def create(web: httpx.AsyncClient, text: bytes, **changes: Any) -> dict[str, Any]:
    headers = changes.pop("headers", {})
    given = {
        "input_file_id": await upload(web, text, headers=headers),
        "endpoint": PATH,
        "completion_window": "24h",
    }
    answer = await web.post("/v1/batches", json=given | changes, headers=headers)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def until(
    web: httpx.AsyncClient, batch: dict[str, Any], *states: str, headers: Any = None
) -> dict[str, Any]:
    """The batch when it is in one of `states`, or is over."""
    states = states or ("completed", "failed", "expired", "cancelled")
    deadline = time.monotonic() + 30
    while True:
        found = (await web.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
        if found["status"] in states:
            return dict(found)
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


async def idle(parts: Parts) -> None:
    """Wait until no batch is worked on."""
    while parts.runner._running:
        await asyncio.sleep(0.01)


async def results(
    web: httpx.AsyncClient, file_id: str | None, headers: Any = None
) -> dict[str, dict[str, Any]]:
    """The lines of a file of results by custom id, which is there once."""
    if file_id is None:
        return {}
    text = (await web.get(f"/v1/files/{file_id}/content", headers=headers)).text
    found = [json.loads(line) for line in text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    assert len({each["id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def stored(folder: Path, kind: str) -> list[Path]:
    """The files of this kind of all groups."""
    return list(folder.glob(f"files/*/{kind}/*"))


# ---------------------------------------------------------------------- a killed server


def work_until_killed(folder: str) -> None:
    """Go on with the batches in `folder`."""

    async def run() -> None:
        async with serving(Path(folder), Model(seconds=0.002)):
            await asyncio.Event().wait()

    asyncio.run(run())


def test_each_request_has_one_result_however_often_the_server_is_killed(tmp_path: Path) -> None:
    """A thousand requests, and six servers that are killed at any moment."""
    count, kills = 1000, 6

    async def begin() -> dict[str, Any]:
        async with serving(tmp_path, Model(gate=asyncio.Semaphore(0))) as parts:
            made = await create(
                parts.web, lines(count, lambda n: "bad" if n % 10 == 3 else f"prompt {n}")
            )
            return await until(parts.web, made, "in_progress")

    async def end(batch: dict[str, Any]) -> None:
        async with serving(tmp_path, Model()) as parts:
            over = await until(parts.web, batch)
            assert over["status"] == "completed"
            counts = {"total": count, "completed": count * 9 // 10, "failed": count // 10}
            assert over["request_counts"] == counts
            good = await results(parts.web, over["output_file_id"])
            bad = await results(parts.web, over["error_file_id"])
            assert good.keys().isdisjoint(bad)
            assert {*good, *bad} == {f"item-{n}" for n in range(count)}
            for custom_id, result in good.items():
                body = result["response"]["body"]
                assert body["text"] == custom_id.replace("item-", "prompt ")
            assert {each["response"]["body"]["error"]["code"] for each in bad.values()} == {"bad"}
            answered = Counter(each["response"]["body"]["process"] for each in good.values())
            assert len(answered) > 2, "one server did nearly everything"
            prompts = [each["response"]["body"]["text"] for each in good.values()]
            assert (over["usage"], over["model"]) == (total_usage(prompts), "tiny")
            await idle(parts)
            listed = (await parts.web.get("/v1/files")).json()["data"]
            assert len(listed) == len(stored(tmp_path, "files")) == 3
            # The logs and the kept input are gone.
            assert [path.name for path in stored(tmp_path, "batches")] == [f"{batch['id']}.json"]

    batch = asyncio.run(begin())
    servers = multiprocessing.get_context("forkserver")
    servers.set_forkserver_preload([__name__])
    for _ in range(kills):
        before = _logged(tmp_path)
        process = servers.Process(target=work_until_killed, args=(str(tmp_path),), daemon=True)
        process.start()
        deadline = time.monotonic() + 30
        while _logged(tmp_path) == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.random() * 0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    for path in tmp_path.glob("files/*/batches/*.output"):  # the power fails
        os.truncate(path, path.stat().st_size - 7)
    asyncio.run(end(batch))


def _logged(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("files/*/batches/*.output"))


class Killed(BaseException):
    """The server ends here."""


@pytest.mark.parametrize("step", ["link_blob", "write_record"])
def test_a_server_that_is_killed_while_it_stores_results_stores_them_once(
    tmp_path: Path, step: str
) -> None:
    async def first() -> dict[str, Any]:
        model = Model(gate=asyncio.Semaphore(0))
        async with serving(tmp_path, model) as parts:
            made = await create(parts.web, lines(5))
            disk: Any = parts.files._disk
            real = getattr(disk, step)

            def killed(group: str, file: Any, *more: Any) -> None:
                if file.purpose == "batch_output":
                    raise Killed
                real(group, file, *more)

            setattr(disk, step, killed)
            life = parts.runner._running[made["id"]].life
            model.open()
            with pytest.raises(Killed):
                await life
            return made

    async def second(made: dict[str, Any]) -> None:
        async with serving(tmp_path, Model()) as parts:
            over = await until(parts.web, made)
            assert over["status"] == "completed"
            assert len(await results(parts.web, over["output_file_id"])) == 5

    asyncio.run(second(asyncio.run(first())))


def test_an_input_that_cannot_be_read_for_a_moment_costs_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_STORAGE_PAUSE_S", 0.01)
    failures = [OSError(errno.EIO, "Input/output error")]

    def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return scan(*args)

    async def run() -> None:
        async with serving(tmp_path, Model(gate=asyncio.Semaphore(2))) as parts:
            made = await create(parts.web, lines(6))
            while (await _counts(parts.web, made))["completed"] < 2:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(runner_module, "scan", failing)
        async with serving(tmp_path, model := Model()) as parts:
            over = await until(parts.web, made)
            assert (over["status"], failures, len(model.asked)) == ("completed", [], 4)
            assert len(await results(parts.web, over["output_file_id"])) == 6

    asyncio.run(run())


def test_a_batch_that_fails_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise ValueError("unexpected")

    async def run() -> None:
        async with serving(tmp_path, Model(gate=asyncio.Semaphore(2))) as parts:
            made = await create(parts.web, lines(6))
            while (await _counts(parts.web, made))["completed"] < 2:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(runner_module, "scan", failing)
        async with serving(tmp_path, Model()) as parts:
            over = await until(parts.web, made)
            assert over["status"] == "failed"
            assert [each["code"] for each in over["errors"]["data"]] == ["internal_error"]
            assert len(await results(parts.web, over["output_file_id"])) == 2
            assert over["request_counts"] == {"total": 6, "completed": 2, "failed": 0}
            assert over["usage"]["output_tokens"] == 6
            assert over["error_file_id"] is None

    asyncio.run(run())


# ---------------------------------------------------------------------- the life of a batch


def test_a_batch_with_answers_of_several_models_names_none(tmp_path: Path) -> None:
    text = lines(3)
    other = text.replace(b'"prompt": "prompt 2"', b'"prompt": "prompt 2", "model": "other"')
    assert other != text

    async def run() -> None:
        async with serving(tmp_path, Model()) as parts:
            made = [await create(parts.web, each) for each in (text, other)]
            assert (made[0]["usage"], made[0]["model"]) == (total_usage([]), None)
            over = [await until(parts.web, each) for each in made]
            assert [each["model"] for each in over] == ["tiny", None]
            assert [each["usage"] for each in over] == [
                total_usage([f"prompt {n}" for n in range(3)])
            ] * 2

    asyncio.run(run())


def test_a_batch_is_cancelled_and_keeps_what_was_answered(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Semaphore(5))
        async with serving(tmp_path, model) as parts:
            made = await create(parts.web, lines(40))
            while (await _counts(parts.web, made))["completed"] < 5 or model.running < SLOTS - 1:
                await asyncio.sleep(0.01)
            answer = await parts.web.post(f"/v1/batches/{made['id']}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelling")
            over = await until(parts.web, made)
            assert (over["status"], model.running) == ("cancelled", 0)
            assert over["cancelled_at"] >= over["cancelling_at"] >= over["created_at"]
            good = await results(parts.web, over["output_file_id"])
            bad = await results(parts.web, over["error_file_id"])
            assert (len(good), len(bad)) == (5, 35)
            assert {each["error"]["code"] for each in bad.values()} == {"batch_cancelled"}
            again = await parts.web.post(f"/v1/batches/{made['id']}/cancel")
            assert (again.status_code, again.json()["error"]["code"]) == (
                409,
                "batch_not_cancellable",
            )
            assert parts.admission.slots.taken == 0

    asyncio.run(run())


def test_a_batch_that_is_cancelled_as_the_server_dies_is_cancelled_later(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, Model(gate=asyncio.Semaphore(0))) as parts:
            made = await create(parts.web, lines(3))
            batch = parts.runner.store.get("", made["id"])
            await until(parts.web, made, "in_progress")
            await parts.runner.store.change(batch, if_in={"in_progress"}, status="cancelling")
        async with serving(tmp_path, model := Model()) as parts:
            over = await until(parts.web, made)
            assert (over["status"], model.asked) == ("cancelled", [])
            assert over["request_counts"] == {"total": 3, "completed": 0, "failed": 3}

    asyncio.run(run())


def test_a_batch_expires_with_its_window(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Semaphore(0))
        async with serving(tmp_path, model) as parts:
            made = await create(parts.web, lines(20), completion_window="1h")
            assert made["expires_at"] == made["created_at"] + 3600
            await until(parts.web, made, "in_progress")
        (path,) = (path for path in stored(tmp_path, "batches") if path.suffix == ".json")
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"expires_at": int(time.time()) + 1}))
        async with serving(tmp_path, Model(seconds=100)) as parts:
            over = await until(parts.web, made)
            assert over["status"] == "expired"
            assert over["output_file_id"] is None
            bad = await results(parts.web, over["error_file_id"])
            assert {each["error"]["code"] for each in bad.values()} == {"batch_expired"}
            assert len(bad) == 20

    asyncio.run(run())


def test_requests_that_the_server_is_too_busy_for_run_later(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, model := Model(refusals=3)) as parts:
            over = await until(parts.web, await create(parts.web, lines(6)))
            assert over["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
            assert len(model.asked) == 9

    asyncio.run(run())


def test_a_request_that_can_never_run_fails_at_once(tmp_path: Path) -> None:
    text = lines(20).replace(b'"prompt": "prompt 7"', b'"prompt": "prompt 7", "n": 5')

    async def run() -> None:
        async with serving(tmp_path, Model(), engine_requests=4) as parts:
            over = await until(parts.web, await create(parts.web, text))
            assert over["request_counts"] == {"total": 20, "completed": 19, "failed": 1}
            failed = (await results(parts.web, over["error_file_id"]))["item-7"]["response"]
            assert failed["status_code"] == 400
            assert failed["body"]["error"]["code"] == "too_many_answers"

    asyncio.run(run())


def test_a_request_whose_work_is_cancelled_by_something_else_runs_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, model := Model(cancels=1)) as parts:
            over = await until(parts.web, await create(parts.web, lines(3)))
            assert over["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
            assert len(model.asked) == 4

    asyncio.run(run())


def test_the_input_may_be_deleted_and_the_results_expire(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Semaphore(0))
        async with serving(tmp_path, model) as parts:
            after = {"anchor": "created_at", "seconds": 3600}
            made = await create(parts.web, lines(3), output_expires_after=after)
            await until(parts.web, made, "in_progress")
            listed = (await parts.web.get("/v1/files")).json()["data"]
            assert [file["id"] for file in listed] == [made["input_file_id"]]
            assert (await parts.web.delete(f"/v1/files/{made['input_file_id']}")).status_code == 200
            model.open()
            over = await until(parts.web, made)
            assert over["request_counts"]["completed"] == 3
            (file,) = (await parts.web.get("/v1/files?purpose=batch_output")).json()["data"]
            assert file["id"] == over["output_file_id"]
            assert file["expires_at"] == file["created_at"] + 3600
            await idle(parts)
            assert len(stored(tmp_path, "blobs")) == 1

    asyncio.run(run())


# ---------------------------------------------------------------------- what is refused


def test_an_invalid_file_fails_the_batch_with_line_numbers(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, model := Model()) as parts:
            text = lines(2) + b"{}\n" + lines(1) + lines(3).replace(PATH.encode(), b"/v1/other")
            over = await until(parts.web, await create(parts.web, text))
            assert (over["status"], model.asked) == ("failed", [])
            assert over["failed_at"] >= over["created_at"]
            found = [(each["code"], each["line"]) for each in over["errors"]["data"]]
            assert found[:2] == [("missing_required_parameter", 3), ("duplicate_custom_id", 4)]
            assert found[2:] == [("duplicate_custom_id", 5), ("duplicate_custom_id", 6),
                                 ("invalid_url", 7)]  # fmt: skip
            assert (over["output_file_id"], over["error_file_id"]) == (None, None)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, 400, "invalid_request", "endpoint"),
        ({"endpoint": None}, 400, "invalid_request", "endpoint"),
        ({"completion_window": "8d"}, 400, "invalid_request", "completion_window"),
        ({"completion_window": "1 day"}, 400, "invalid_request", "completion_window"),
        ({"input_file_id": "file-" + "0" * 32}, 404, "file_not_found", "input_file_id"),
        ({"input_file_id": "../x"}, 404, "file_not_found", "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "invalid_request", "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(17)}}, 400, "invalid_request", "metadata"),
        ({"metadata": {"k": "x" * 513}}, 400, "invalid_request", "metadata.k"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            400,
            "invalid_request",
            "output_expires_after.seconds",
        ),
    ],
)
def test_an_invalid_batch_is_refused_with_its_param(
    tmp_path: Path, changes: dict[str, Any], status: int, code: str, param: str
) -> None:
    async def run() -> None:
        async with serving(tmp_path, Model()) as parts:
            given = {
                "input_file_id": await upload(parts.web, lines(1)),
                "endpoint": PATH,
                "completion_window": "24h",
            }
            answer = await parts.web.post("/v1/batches", json=given | changes)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
            assert (await parts.web.get("/v1/batches")).json()["data"] == []

    asyncio.run(run())


def test_a_group_has_quotas_of_batches_and_of_requests(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Semaphore(0))
        async with serving(tmp_path, model, group_count=2, group_items=50) as parts:
            first = await create(parts.web, lines(30))
            await until(parts.web, first, "in_progress")
            over = await until(parts.web, await create(parts.web, lines(21)))
            assert over["errors"]["data"][0]["code"] == "batch_quota_exceeded"
            await until(parts.web, await create(parts.web, lines(20)), "in_progress")
            file_id = await upload(parts.web, lines(1))
            given = {"input_file_id": file_id, "endpoint": PATH, "completion_window": "24h"}
            answer = await parts.web.post("/v1/batches", json=given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                429,
                "batch_quota_exceeded",
            )

    asyncio.run(run())


def test_results_wait_for_room_in_the_quota_of_files(tmp_path: Path) -> None:
    async def run() -> None:
        text = lines(20)
        async with serving(tmp_path, Model(seconds=0.01), max_bytes=len(text) + 1500) as parts:
            made = await create(parts.web, text)
            counts = {"completed": -1}
            while counts["completed"] != (counts := await _counts(parts.web, made))["completed"]:
                await asyncio.sleep(0.5)
            assert 0 < counts["completed"] < 20
            # The file itself is kept for the batch: other files have to make room.
            assert (await until(parts.web, made, "in_progress"))["status"] == "in_progress"
            answer = await parts.web.post(f"/v1/batches/{made['id']}/cancel")
            assert answer.status_code == 200
            over = await until(parts.web, made)
            assert len(await results(parts.web, over["output_file_id"])) == counts["completed"]

    asyncio.run(run())


def test_batches_that_are_created_at_the_same_time_do_not_pass_the_quota(tmp_path: Path) -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Semaphore(0))
        async with serving(tmp_path, model, group_count=2) as parts:
            file_id = await upload(parts.web, lines(1))
            given = {"input_file_id": file_id, "endpoint": PATH, "completion_window": "24h"}
            answers = await asyncio.gather(
                *(parts.web.post("/v1/batches", json=given) for _ in range(6))
            )
            assert sorted(each.status_code for each in answers) == [200] * 2 + [429] * 4
            for each in answers:
                if each.status_code == 200:
                    await until(parts.web, each.json(), "in_progress")

    asyncio.run(run())


async def _counts(web: httpx.AsyncClient, batch: dict[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = (await web.get(f"/v1/batches/{batch['id']}")).json()["request_counts"]
    return counts


def test_batches_are_listed_by_page_the_newest_first(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, Model(), group_count=10) as parts:
            made = [
                await create(parts.web, lines(1), metadata={"number": str(n)}) for n in range(5)
            ]
            names = [batch["id"] for batch in reversed(made)]
            page = (await parts.web.get("/v1/batches?limit=2")).json()
            assert [batch["id"] for batch in page["data"]] == names[:2]
            assert (page["has_more"], page["last_id"]) == (True, names[1])
            rest = (await parts.web.get(f"/v1/batches?after={names[1]}")).json()
            assert [batch["id"] for batch in rest["data"]] == names[2:]
            assert rest["data"][-1]["metadata"] == {"number": "0"}
            unknown = await parts.web.get("/v1/batches?after=batch_0")
            assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "after")

    asyncio.run(run())


def test_the_body_of_a_request_is_not_held_while_it_is_answered() -> None:
    """It may be large, and the memory for bodies is given back when its media are loaded."""
    item = Item("a", PATH, json.dumps({"prompt": "x" * 1000}).encode())
    size = len(item.body)
    others = list[int]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).pop("body")
        assert (len(body), dict(scope["headers"])[b"content-length"]) == (size, b"%d" % size)
        others.append(sys.getrefcount(body) - 2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def run() -> None:
        client = batches.InnerClient(app, None, None)
        turn = await Admission(limits(running=SLOTS, in_engine=SLOTS)).background_turn("")
        assert (await client.ask(item, "id", "", turn)).body == b"{}"

    asyncio.run(run())
    assert others == [0]


# ---------------------------------------------------------------------- groups and others


def test_batches_belong_to_the_group_of_the_key(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, model := Model(), with_keys=True) as parts:
            assert (await parts.web.get("/v1/batches")).status_code == 401
            made = await create(parts.web, lines(2), headers=A)
            over = await until(parts.web, made, headers=A)
            assert over["request_counts"]["completed"] == 2
            assert "authorization" not in model.asked[0]["headers"]  # no key is kept
            assert model.asked[0]["headers"]["x-priority"] == "1000001"
            for ask in (
                parts.web.get(f"/v1/batches/{made['id']}", headers=B),
                parts.web.post(f"/v1/batches/{made['id']}/cancel", headers=B),
                parts.web.get(f"/v1/files/{over['output_file_id']}", headers=B),
            ):
                assert (await ask).status_code == 404
            assert (await parts.web.get("/v1/batches", headers=B)).json()["data"] == []
            assert b"sk-a" not in b"".join(
                path.read_bytes()
                for folder in ("batches", "blobs", "files")
                for path in stored(tmp_path, folder)
            )

    asyncio.run(run())


def test_half_of_a_groups_limit_per_minute_is_left_to_others(tmp_path: Path) -> None:
    """The group b may send 4 requests a minute, one at a time."""

    async def run() -> None:
        async with serving(tmp_path, model := Model(), with_keys=True) as parts:
            made = await create(parts.web, lines(10), headers=B)
            while len(model.asked) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            # The batch has used half of the four, and its requests do not count as concurrent.
            assert len(model.asked) in (2, 3)
            answer = await parts.web.post(PATH, json={"prompt": "x"}, headers=B)
            assert answer.status_code == 200
            await parts.web.post(f"/v1/batches/{made['id']}/cancel", headers=B)
            await until(parts.web, made, headers=B)

    asyncio.run(run())


def test_a_batch_of_a_group_without_keys_waits(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, Model(gate=asyncio.Semaphore(0)), with_keys=True) as parts:
            made = await create(parts.web, lines(2), headers=A)
        async with serving(tmp_path, model := Model()) as parts:  # without the keys file
            await asyncio.sleep(0.3)
            assert model.asked == []
        async with serving(tmp_path, Model(), with_keys=True) as parts:
            over = await until(parts.web, made, headers=A)
            assert over["request_counts"]["completed"] == 2

    asyncio.run(run())


def test_interactive_requests_do_not_wait_for_batches(tmp_path: Path) -> None:
    """A batch leaves slots free, and takes none that becomes free while another request waits."""

    async def run() -> None:
        model = Model(gate=asyncio.Semaphore(0))
        async with serving(tmp_path, model) as parts:
            made = await create(parts.web, lines(60))
            while model.running < SLOTS - 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert model.running == SLOTS - 1
            asks = [
                asyncio.create_task(parts.web.post(PATH, json={"prompt": f"mine {n}"}))
                for n in range(12)
            ]
            while not str(model.asked[-1]["prompt"]).startswith("mine"):
                await asyncio.sleep(0.01)  # one slot was left
            before = len(model.asked)
            model.open()
            assert {(await each).status_code for each in asks} == {200}
            order = [str(each["prompt"]) for each in model.asked[before:]]
            mine = [n for n, prompt in enumerate(order) if prompt.startswith("mine")]
            assert mine == list(range(11)), order  # before all further requests of the batch
            assert (await until(parts.web, made))["request_counts"]["completed"] == 60

    asyncio.run(run())


def test_no_request_of_a_batch_begins_while_the_server_drains(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, model := Model()) as parts:
            parts.app.state.draining = True
            await create(parts.web, lines(2))
            await asyncio.sleep(0.3)
            assert model.asked == []

    asyncio.run(run())


def test_without_the_files_api_there_are_no_batches(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, Model()) as parts:
            parts.app.state.batches = None
            answer = await parts.web.get("/v1/batches")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "files_disabled")

    asyncio.run(run())

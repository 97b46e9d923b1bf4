"""What several replicas answer together, by small servers in their place."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from server.replica import Replica
from server.replicas import together
from server.replicas.together import Together

PATIENCE_S = 60
PAGE = "# TYPE a gauge\na 1\n"
Answers = Callable[[web.Request], Awaitable[web.Response]]


async def good(request: web.Request) -> web.Response:
    return web.Response(text=PAGE)


async def unready(request: web.Request) -> web.Response:
    return web.Response(status=503)


@contextlib.asynccontextmanager
async def asking(folder: Path, *replicas: Answers) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of `Together` in front of these replicas."""
    places = [Replica(n, len(replicas), folder, folder, False) for n in range(len(replicas))]
    async with contextlib.AsyncExitStack() as stack:
        for place, answer in zip(places, replicas, strict=True):
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app, shutdown_timeout=0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.UnixSite(runner, place.socket()).start()
        whole = Together(places, lambda index: 0)
        await stack.enter_async_context(whole.answering(folder / "together"))
        connector = aiohttp.UnixConnector(str(folder / "together"))
        timeout = aiohttp.ClientTimeout(PATIENCE_S)
        session = aiohttp.ClientSession("http://a", connector=connector, timeout=timeout)
        yield await stack.enter_async_context(session)


def test_a_replica_that_hangs_does_not_delay_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_PROBE_S", "_SCRAPE_S"):
        monkeypatch.setattr(together, limit, None)

    async def run() -> None:
        may_answer = asyncio.Event()

        async def hanging(request: web.Request) -> web.Response:
            await may_answer.wait()
            return web.Response()

        async with (
            asking(tmp_path, hanging, good) as client,
            client.get("/ready") as answer,
        ):
            assert answer.status == 200
            assert await answer.text() == PAGE
            may_answer.set()

    asyncio.run(run())


def test_probes_tell_of_the_best_answer(tmp_path: Path) -> None:
    async def run() -> None:
        async with asking(tmp_path, unready, unready) as client, client.get("/ready") as answer:
            assert answer.status == 503
        async with asking(tmp_path, unready, good) as client, client.get("/ready") as answer:
            assert answer.status == 200

    asyncio.run(run())


def test_metrics_have_one_form_for_all_clients(tmp_path: Path) -> None:
    seen: list[str] = []

    async def noting(request: web.Request) -> web.Response:
        seen.extend(request.headers.getall("Accept"))
        seen.extend(request.headers.getall("Accept-Encoding"))
        return web.Response(text=PAGE)

    async def run() -> None:
        headers = {"Accept": "application/openmetrics-text", "Accept-Encoding": "gzip"}
        async with (
            asking(tmp_path, noting) as client,
            client.get("/metrics/", headers=headers) as answer,
        ):
            assert 'a{replica="0"} 1' in await answer.text()

    asyncio.run(run())
    assert seen == ["*/*", "identity"]


def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        body = bytes(together._MOST_BODY_BYTES + 1)
        async with (
            asking(tmp_path, good) as client,
            client.post("/v1/load_lora_adapter", data=body) as answer,
        ):
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"

    asyncio.run(run())

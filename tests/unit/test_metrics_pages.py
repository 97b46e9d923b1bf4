"""Which scrapes of /metrics share a page."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, make_asgi_app

from server.errors import ServerBusy
from server.http import metrics_pages
from server.http.metrics_pages import PLAIN, SHARED_S, Form, Pages
from tests.scrape import FRESH

WAIT_S = 30
SCRAPES = 500


class Writer:
    """Writes numbered pages, each once `may_write`."""

    def __init__(self) -> None:
        self.written: list[Form] = []
        self.began = threading.Semaphore(0)
        self.may_write = threading.Event()
        self.fails = False

    def __call__(self, form: Form) -> bytes:
        self.written.append(form)
        number = len(self.written)
        self.began.release()
        assert self.may_write.wait(WAIT_S)
        if self.fails:
            raise ValueError("broken")
        return b"page %d" % number


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(writer: Writer, clock: Clock, test: Callable[[Pages], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await test(Pages(writer, clock))

    asyncio.run(bounded())


async def scrapes(pages: Pages, number: int, **options: Any) -> list[asyncio.Task[bytes]]:
    """So many scrapes, all of which wait for a page."""
    tasks = [asyncio.create_task(pages.get(PLAIN, **options)) for _ in range(number)]
    await asyncio.sleep(0)
    return tasks


def test_scrapes_during_the_writing_of_a_page_share_it(writer: Writer, clock: Clock) -> None:
    async def test(pages: Pages) -> None:
        first = await scrapes(pages, 1)
        await asyncio.to_thread(writer.began.acquire)
        clock.now += 10 * SHARED_S  # however long it takes
        others = await scrapes(pages, SCRAPES)
        writer.may_write.set()
        assert set(await asyncio.gather(*first, *others)) == {b"page 1"}

    run(writer, clock, test)
    assert len(writer.written) == 1


def test_scrapes_within_a_second_share_a_page(writer: Writer, clock: Clock) -> None:
    writer.may_write.set()

    async def test(pages: Pages) -> None:
        assert await pages.get(PLAIN) == b"page 1"
        clock.now += SHARED_S
        assert await pages.get(PLAIN) == b"page 1"
        clock.now += 0.01
        assert await pages.get(PLAIN) == b"page 2"

    run(writer, clock, test)


def test_fresh_scrapes_share_the_first_page_that_begins_after_them(
    writer: Writer, clock: Clock
) -> None:
    async def test(pages: Pages) -> None:
        (first,) = await scrapes(pages, 1)
        await asyncio.to_thread(writer.began.acquire)
        clock.now += 0.1
        others = await scrapes(pages, SCRAPES, is_fresh=True)
        clock.now += 0.1
        writer.may_write.set()
        assert await first == b"page 1"
        assert set(await asyncio.gather(*others)) == {b"page 2"}
        clock.now += 0.1
        assert await pages.get(PLAIN, is_fresh=True) == b"page 3"
        assert await pages.get(PLAIN) == b"page 3"

    run(writer, clock, test)
    assert len(writer.written) == 3


def test_a_client_that_leaves_ends_no_page_of_others(writer: Writer, clock: Clock) -> None:
    async def test(pages: Pages) -> None:
        leaver, other = await scrapes(pages, 2)
        leaver.cancel()
        await asyncio.wait([leaver])
        writer.may_write.set()
        assert await other == b"page 1"

    run(writer, clock, test)


def test_a_failure_is_not_shared_with_later_scrapes(writer: Writer, clock: Clock) -> None:
    async def test(pages: Pages) -> None:
        writer.fails = True
        writer.may_write.set()
        results = await asyncio.gather(*await scrapes(pages, 3), return_exceptions=True)
        assert [str(error) for error in results] == ["broken"] * 3
        assert len(writer.written) == 1
        writer.fails = False
        assert await pages.get(PLAIN) == b"page 2"

    run(writer, clock, test)


def test_few_forms_of_the_page_are_kept(writer: Writer, clock: Clock) -> None:
    writer.may_write.set()
    forms = [Form("text/plain", PLAIN.encode, names=(f"name{n}",)) for n in range(100)]

    async def test(pages: Pages) -> None:
        for form in forms:
            await pages.get(form)
        await pages.get(forms[-1])
        assert len(writer.written) == 100
        await pages.get(forms[0])
        assert len(writer.written) == 101

    run(writer, clock, test)


def test_pages_of_many_forms_are_refused_while_others_are_written(
    writer: Writer, clock: Clock
) -> None:
    forms = [Form("text/plain", PLAIN.encode, names=(f"name{n}",)) for n in range(20)]

    async def test(pages: Pages) -> None:
        tasks = [asyncio.create_task(pages.get(form)) for form in forms]
        await asyncio.sleep(0)
        plain = await scrapes(pages, 1)  # what monitoring asks for is written all the same
        writer.may_write.set()
        pages_written = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(page) for page in pages_written] == [bytes] * 8 + [ServerBusy] * 12
        assert await plain[0] == b"page 9"

    run(writer, clock, test)


# ---------------------------------------------------------------------- the routes

OPEN_METRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
PLAIN_TEXT = {"Accept": "text/plain"}
GZIP = {"Accept-Encoding": "gzip"}
NONE = {"Accept-Encoding": "identity"}


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    for name in ("apples", "pears"):
        Counter(name, "Fruit.", registry=registry).inc()
    return registry


def ask(app: Any, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    async def ask_it() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask_it())


def our_app(registry: CollectorRegistry) -> FastAPI:
    app = FastAPI()
    app.router.routes += metrics_pages.routes(registry)
    return app


@pytest.mark.parametrize("path", ["/metrics/", "/metricsfoo", "/metrics/?name[]=pears_total"])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("format_", [OPEN_METRICS, PLAIN_TEXT])
@pytest.mark.parametrize("coding", [GZIP, NONE])
def test_pages_are_those_of_prometheus_client(
    registry: CollectorRegistry,
    path: str,
    method: str,
    format_: dict[str, str],
    coding: dict[str, str],
) -> None:
    headers = {**format_, **coding}
    theirs = ask(make_asgi_app(registry), method, path, headers)
    ours = ask(our_app(registry), method, path, headers)
    assert "pears_total" in ours.text
    assert ours.text == theirs.text
    for name in ("content-type", "content-encoding"):
        assert ours.headers.get(name) == theirs.headers.get(name)


def test_the_path_itself_is_text(registry: CollectorRegistry) -> None:
    found = ask(our_app(registry), "GET", "/metrics", {**OPEN_METRICS, **GZIP})
    assert found.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
    assert "content-encoding" not in found.headers
    assert "apples_total 1.0" in found.text
    head = ask(our_app(registry), "HEAD", "/metrics", {})
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_methods_are_refused(registry: CollectorRegistry, method: str) -> None:
    assert ask(our_app(registry), method, "/metrics", {}).status_code == 405


def test_scrapers_share_a_page_unless_they_want_a_new_one(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_pages, "SHARED_S", WAIT_S)

    async def scrape() -> None:
        transport = httpx.ASGITransport(our_app(registry))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert "later" not in (await client.get("/metrics")).text
            Counter("later", "Vegetable.", registry=registry)
            assert "later" not in (await client.get("/metrics")).text
            assert "later" in (await client.get("/metrics?x", headers=OPEN_METRICS | FRESH)).text

    asyncio.run(scrape())

"""`/metrics`. To write the page takes tens of milliseconds, for which the event loop competes with
the thread that writes it, so scrapes that come at about the same time share a page."""

import asyncio
import gzip
import re
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Mount
from starlette.types import Receive, Scope, Send

from server.errors import ServerBusy

PATH = "/metrics"
# How long after it was written a page is given to further scrapes.
SHARED_S = 1.0
# Clients choose the form of a page.
_MOST_KEPT = 8


@dataclass(frozen=True)
class Form:
    """What a scrape asks for: a format, compression, and the names of series, or () for all."""

    content_type: str
    encode: Callable[[Collector], bytes] = field(compare=False)
    is_gzip: bool = False
    names: tuple[str, ...] = ()


PLAIN = Form(CONTENT_TYPE_LATEST, generate_latest)


@dataclass
class _Page:
    began: float
    body: "asyncio.Future[bytes]"
    ended: float | None = None


class Pages:
    """The pages that are being written or were just written, in one thread."""

    def __init__(
        self, write: Callable[[Form], bytes], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._kept: dict[Form, _Page] = {}

    async def get(self, form: Form, is_fresh: bool = False) -> bytes:
        """A page that is being written or was written within the last SHARED_S; if it must be
        `is_fresh`, one whose writing began after this call.

        Raises what `write` raises, and ServerBusy if many other forms are being written."""
        asked = self._clock()
        while True:
            page = self._kept.get(form)
            if page is None or self._is_over(page):
                page = self._start(form)
            elif is_fresh and page.began < asked:
                if page.body.done():
                    page = self._start(form)
                else:
                    await asyncio.wait([page.body])
                    continue
            return await asyncio.shield(page.body)  # others may wait when this client leaves

    def _is_over(self, page: _Page) -> bool:
        if not page.body.done():
            return False
        failed = page.body.cancelled() or page.body.exception() is not None
        return failed or page.ended is None or self._clock() - page.ended > SHARED_S

    def _start(self, form: Form) -> _Page:
        if (
            form != PLAIN
            and sum(not page.body.done() for page in self._kept.values()) >= _MOST_KEPT
        ):
            raise ServerBusy("too many forms of the metrics are asked for; try again later")
        loop = asyncio.get_running_loop()
        page = _Page(self._clock(), loop.run_in_executor(self._thread, self._write, form))

        def end(_: object) -> None:
            page.ended = self._clock()

        page.body.add_done_callback(end)
        self._kept.pop(form, None)
        self._kept[form] = page
        if len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return page


def routes(
    registry: CollectorRegistry,
    whole: Callable[[], Coroutine[Any, Any, CollectorRegistry]] | None = None,
) -> list[BaseRoute]:
    """The routes in the place of vLLM's: `/metrics`, always as text, and all paths that start with
    it, in the format that the client accepts. `registry` is that of this process; where it is one
    of several, `whole` gives that of all."""
    pages = Pages(
        (lambda form: _written(registry, form)) if whole is None else _written_by_all(whole)
    )
    router = APIRouter()

    async def metrics(request: Request) -> Response:
        """Endpoint that serves Prometheus metrics."""
        return await _answer(pages, PLAIN, request)

    router.add_api_route(PATH, metrics, methods=["GET"], response_class=_Text)
    router.add_api_route(PATH, metrics, methods=["HEAD"], include_in_schema=False)

    async def negotiated(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await (await _answer(pages, _accepted(request), request))(scope, receive, send)

    others = Mount(PATH, negotiated)
    others.path_regex = re.compile(f"^{PATH}(?P<path>.+)$")
    return [*router.routes, others]


def _written_by_all(
    whole: Callable[[], Coroutine[Any, Any, CollectorRegistry]],
) -> Callable[[Form], bytes]:
    """What writes the metrics that `whole` gets on this event loop; called in a thread."""
    loop = asyncio.get_running_loop()

    def write(form: Form) -> bytes:
        return _written(asyncio.run_coroutine_threadsafe(whole(), loop).result(), form)

    return write


class _Text(Response):
    media_type = CONTENT_TYPE_LATEST


async def _answer(pages: Pages, form: Form, request: Request) -> Response:
    is_fresh = "no-cache" in request.headers.get("cache-control", "").lower()
    body = await pages.get(form, is_fresh)
    headers = {"Content-Encoding": "gzip"} if form.is_gzip else {}
    return Response(body, headers={"Content-Type": form.content_type, **headers})


def _accepted(request: Request) -> Form:
    """As `prometheus_client.make_asgi_app` reads a request."""
    encode, content_type = choose_encoder(",".join(request.headers.getlist("accept")))
    is_gzip = gzip_accepted(",".join(request.headers.getlist("accept-encoding")))
    names = parse_qs(request.url.query).get("name[]", ())
    return Form(content_type, encode, is_gzip, tuple(names))


def _written(registry: CollectorRegistry, form: Form) -> bytes:
    shown = registry.restricted_registry(form.names) if form.names else registry
    found = form.encode(shown)
    return gzip.compress(found) if form.is_gzip else found

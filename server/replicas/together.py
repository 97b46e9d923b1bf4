"""What all replicas answer together: whether one is ready, their metrics, and changes to all."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import CONTENT_TYPE_LATEST

from server.replica import Replica

PROBES = ("/health", "/ready", "/ping")
_METRICS = "/metrics"
_CACHE = "/v1/cache"
# Each replica has its own state: what changes it goes to all of them.
_CHANGES = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/start_profile",
    "/stop_profile",
)
PATHS = (*PROBES, _METRICS, _CACHE, *_CHANGES)
_PROBE_S, _SCRAPE_S, _CHANGE_S = 5.0, 10.0, 300.0
_MOST_BODY_BYTES = 1 << 20
_OF_CONNECTION = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"}
)
# Pages of metrics can be merged in one form only.
_OF_FORM = frozenset({"accept", "accept-encoding"})
_TOO_LARGE = (
    b'{"error": {"message": "the request body has more than 1 MiB, which is the limit", "type": '
    b'"invalid_request_error", "param": null, "code": "request_too_large"}}'
)
_UNAVAILABLE = (
    b'{"error": {"message": "no replica is ready", "type": "server_error", "param": null, '
    b'"code": "unavailable"}}'
)


@dataclass(frozen=True)
class Answer:
    """What a replica has answered; 503 if it does not."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class Together:
    """Answers on a socket in the folder of the replicas, while its `async with` block is open."""

    def __init__(self, replicas: Sequence[Replica], restarts: Callable[[int], int]) -> None:
        """`restarts`: how often a replica was started again."""
        self._replicas = replicas
        self._restarts = restarts
        self.drains = False
        """While it is true, the server is not ready."""

    @contextlib.asynccontextmanager
    async def answering(self, path: Path) -> AsyncIterator[None]:
        app = web.Application(client_max_size=_MOST_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.UnixSite(runner, path).start()
            yield
        finally:
            await runner.cleanup()

    async def is_ready(self, replica: Replica, path: str = "/ready") -> bool:
        return (
            await self._ask(replica, "GET", path, {}, b"", _PROBE_S)
        ).status == web.HTTPOk.status_code

    # ------------------------------------------------------------------ requests

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path.rstrip("/")
        try:
            await request.read()  # which keeps it
        except web.HTTPRequestEntityTooLarge:
            return web.Response(
                status=413, body=_TOO_LARGE, headers={"Content-Type": "application/json"}
            )
        if any(path.endswith(probe) for probe in PROBES):
            if self.drains and path.endswith("/ready"):
                return _unavailable()
            return await self._first_good(request)
        answers = await self._ask_all(request)
        refused = [answer for answer in answers if answer.status >= web.HTTPBadRequest.status_code]
        if path.endswith(_METRICS):
            return self._metrics(answers, refused)
        if refused:
            return _passed(refused[0])
        if request.method == "GET" and path.endswith(_CACHE):
            found = [json.loads(answer.body) for answer in answers]
            return web.json_response({"object": "list", "data": found})
        return _passed(answers[0])

    async def _first_good(self, request: web.Request) -> web.Response:
        """The first good answer, so that a replica that hangs delays none; else the best one."""
        asking = await self._asked(request, _PROBE_S)
        answers = []
        try:
            for answered in asyncio.as_completed(asking):
                answers.append(await answered)
                if answers[-1].status == web.HTTPOk.status_code:
                    break
        finally:
            for task in asking:
                task.cancel()
        return _passed(min(answers, key=lambda answer: answer.status))

    def _metrics(self, answers: Sequence[Answer], refused: Sequence[Answer]) -> web.Response:
        """Those of the replicas that answer."""
        if len(refused) == len(answers):
            return _passed(refused[0])
        pages = {
            index: answer.body.decode()
            for index, answer in enumerate(answers)
            if answer not in refused
        }
        own = [
            "# HELP saccade_replica_up Whether the replica answers.\n",
            "# TYPE saccade_replica_up gauge\n",
            *(f'saccade_replica_up{{replica="{n}"}} {int(n in pages)}\n' for n in self._places()),
            "# HELP saccade_replica_restarts_total How often the replica was started again.\n",
            "# TYPE saccade_replica_restarts_total counter\n",
            *(
                f'saccade_replica_restarts_total{{replica="{n}"}} {self._restarts(n)}\n'
                for n in self._places()
            ),
        ]
        text = merged(pages) + "".join(own)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _places(self) -> range:
        return range(len(self._replicas))

    # ------------------------------------------------------------------ asking replicas

    async def _ask_all(self, request: web.Request) -> list[Answer]:
        timeout_s = _SCRAPE_S if request.method in ("GET", "HEAD") else _CHANGE_S
        return await asyncio.gather(*await self._asked(request, timeout_s))

    async def _asked(self, request: web.Request, timeout_s: float) -> "list[asyncio.Task[Answer]]":
        """The answers of all replicas, in their order, each when it comes."""
        body = await request.read()
        headers = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in _OF_CONNECTION | _OF_FORM
        )
        headers["Accept-Encoding"] = "identity"
        method, path = request.method, request.path_qs
        return [
            asyncio.create_task(self._ask(each, method, path, headers, body, timeout_s))
            for each in self._replicas
        ]

    async def _ask(
        self,
        replica: Replica,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout_s: float,
    ) -> Answer:
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(str(replica.socket())),
                    timeout=aiohttp.ClientTimeout(timeout_s),
                ) as session,
                session.request(
                    method, f"http://replica{path}", headers=headers, data=body or None
                ) as response,
            ):
                kept = {
                    name: value
                    for name, value in response.headers.items()
                    if name.lower() not in _OF_CONNECTION
                }
                return Answer(response.status, await response.read(), kept)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return Answer(web.HTTPServiceUnavailable.status_code, _UNAVAILABLE, _JSON)


_JSON = {"Content-Type": "application/json", "Retry-After": "5"}


def _passed(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)


def _unavailable() -> web.Response:
    return web.Response(status=503, body=_UNAVAILABLE, headers=_JSON)


def merged(pages: Mapping[int, str]) -> str:
    """Pages of metrics in Prometheus' text format as one, in which each series has a label
    `replica`."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for index, page in pages.items():
        heads: list[str] = []
        series: list[str] = []
        for line in page.splitlines(keepends=True):
            if line.startswith(("# HELP ", "# TYPE ")):
                heads, series = families.setdefault(line.split(" ", 3)[2].strip(), ([], []))
                if line not in heads:
                    heads.append(line)
            elif not line.startswith("#") and line.strip():
                series.append(_labelled(line, index))
    return "".join("".join((*heads, *series)) for heads, series in families.values())


def _labelled(line: str, index: int) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f'{name}{{replica="{index}",{rest}'
    name, _, value = line.partition(" ")
    return f'{name}{{replica="{index}"}} {value}'

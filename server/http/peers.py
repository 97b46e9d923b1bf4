"""How several front ends act as one server.

Each answers the others on a socket in a private folder. What concerns the server as a whole is
passed on to the first one: uploaded files and batches, which have one owner, and `/metrics` and
`/v1/cache`, for which that one asks the others.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

import aiohttp
import msgspec
import uvicorn
from multidict import CIMultiDict
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

from server.concurrency import cancel
from server.engine.vllm_adapter.engine_caches import EngineCaches
from server.errors import ServerBusy
from server.front_ends import FrontEnd
from server.http import batches, files, metrics_pages
from server.http.errors import respond
from server.http.server import Server
from server.ingest.fetch_cache import FetchCache
from server.telemetry import merged

log = logging.getLogger("saccade")

OF_FIRST = (files.PATH, batches.PATH, metrics_pages.PATH, "/v1/cache")
_METRICS, _CACHE = "/-/metrics", "/-/cache"
_ANSWER_S = 5.0
_POLL_S = 0.05
_CHUNK_BYTES = 256 * 1024
# Headers of one connection, and those that the forwarding side sets.
_OF_CONNECTION = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
        b"x-forwarded-for",
        b"x-forwarded-proto",
    }
)
_NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_UNREACHABLE = "the process that does this is being started; try again later"


class Peers:
    """This front end among the others; while its `async with` block is open, it answers them."""

    def __init__(self, mine: FrontEnd, registry: CollectorRegistry) -> None:
        self.mine = mine
        self._registry = registry
        self._past = merged.Past()
        self.updated: Callable[[], dict[str, float]] = dict
        """When the engines' statistics last came to this front end, by engine."""

    @contextlib.asynccontextmanager
    async def answering(
        self, app: ASGIApp, caches: EngineCaches, fetched: FetchCache | None, outer: Server
    ) -> AsyncIterator[None]:
        """Answer the others, and let `app` answer what they pass on. At the end, such requests may
        finish within the drain time-out of `outer`, the server for clients, unless it must end."""
        path = self.mine.peer_socket(self.mine.index)
        path.unlink(missing_ok=True)  # that of a front end that was killed
        config = uvicorn.Config(
            _Inner(app, self._own_metrics, caches, fetched),
            uds=str(path),
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            forwarded_allow_ips="*",
            timeout_keep_alive=3600,
        )
        server = _Server(config)
        task = asyncio.create_task(server.run_quietly())
        try:
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(outer.left_to_drain_s()):
                    # uvicorn offers no event
                    while server.server_state.tasks and not outer.server_state.must_end:  # noqa: ASYNC110
                        await asyncio.sleep(_POLL_S)
            await cancel(task)

    # ------------------------------------------------------------------ asking the others

    async def ask(self, method: str, path: str) -> dict[int, Any]:
        """The answers of the others, by index; of those that answer in time."""
        others = [index for index in range(self.mine.count) if index != self.mine.index]
        found = await asyncio.gather(*(self._ask(index, method, path) for index in others))
        return {
            index: answer for index, answer in zip(others, found, strict=True) if answer is not None
        }

    async def _ask(self, index: int, method: str, path: str) -> Any:
        try:
            async with (
                self._session(index, aiohttp.ClientTimeout(_ANSWER_S)) as session,
                session.request(method, f"http://front-end{path}") as response,
            ):
                return msgspec.msgpack.decode(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            log.warning("front end %d does not answer: %r", index, error)
            return None

    def _session(self, index: int, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(self.mine.peer_socket(index))),
            timeout=timeout,
            auto_decompress=False,
            skip_auto_headers=_NOT_ADDED,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    # ------------------------------------------------------------------ metrics

    def _own_metrics(self) -> bytes:
        """Blocks."""
        page = merged.Page(
            self.mine.restarts[self.mine.index],
            self.updated(),
            merged.families(self._registry.collect()),
        )
        return msgspec.msgpack.encode(page)

    async def whole_registry(self) -> CollectorRegistry:
        """The metrics of all front ends together."""
        theirs, own = await asyncio.gather(
            self.ask("GET", _METRICS), asyncio.to_thread(self._own_metrics)
        )
        return await asyncio.to_thread(self._joined, {self.mine.index: own, **theirs})

    def _joined(self, answers: dict[int, bytes]) -> CollectorRegistry:
        pages = {
            index: msgspec.msgpack.decode(answer, type=merged.Page)
            for index, answer in answers.items()
        }
        registry = CollectorRegistry(auto_describe=True)
        restarts = sum(self.mine.restarts)
        registry.register(merged.Whole(self._past.with_known(pages), len(pages), restarts))
        return registry

    # ------------------------------------------------------------------ caches

    async def caches(self) -> list[dict[str, Any]]:
        """The reports of the others."""
        return list((await self.ask("GET", _CACHE)).values())

    async def clear_caches(self) -> None:
        """Let the others clear theirs."""
        await self.ask("DELETE", _CACHE)

    # ------------------------------------------------------------------ passing on

    def forwarding(self, app: ASGIApp, root_path: str) -> ASGIApp:
        """`app`, but with the first front end for what is its own."""
        return (
            app
            if self.mine.is_first
            else _Forward(
                app, self._to_first, functools.partial(self.passes_on, root_path=root_path)
            )
        )

    def passes_on(self, path: str, root_path: str) -> bool:
        """Whether the first front end gets the requests for `path`, bodies included."""
        below = path.removeprefix(root_path)
        is_its = any(below == each or below.startswith(each + "/") for each in OF_FIRST)
        return is_its and not self.mine.is_first

    def _to_first(self) -> aiohttp.ClientSession:
        # An answer may take as long as an upload: the supervisor ends a first one that hangs.
        return self._session(0, aiohttp.ClientTimeout(None, sock_connect=_ANSWER_S))


class _Server(uvicorn.Server):
    """uvicorn without signals, and without lines in the log that look like the server's."""

    async def run_quietly(self) -> None:
        """Serve until it is cancelled; then the socket closes."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup()
        try:
            await self.main_loop()
        finally:
            for server in self.servers:
                server.close()

    def _log_started_message(self, listeners: object) -> None: ...


class _Inner:
    """What answers the other front ends."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Callable[[], bytes],
        caches: EngineCaches,
        fetched: FetchCache | None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._caches = caches
        self._fetched = fetched

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        if scope["path"] == _METRICS:
            body = msgspec.msgpack.encode(await asyncio.to_thread(self._metrics))
        elif scope["method"] == "GET":
            found = await self._caches.report()
            if self._fetched is not None:
                found["urls"] = asdict(self._fetched.stats())
            body = msgspec.msgpack.encode(found)
        else:
            await self._caches.clear()
            if self._fetched is not None:
                self._fetched.clear()
            body = msgspec.msgpack.encode(True)
        length = str(len(body)).encode()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", length)],
            }
        )
        await send({"type": "http.response.body", "body": body})


class _Forward:
    """Passes some requests to the first front end, bytes as they are, and the answers back."""

    def __init__(
        self,
        app: ASGIApp,
        to_first: Callable[[], aiohttp.ClientSession],
        passes_on: Callable[[str], bool],
    ) -> None:
        self._app = app
        self._to_first = to_first
        self._passes_on = passes_on
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._passes_on(scope["path"]):
            await self._app(scope, receive, send)
            return
        if self._session is None:
            self._session = self._to_first()
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._pass_on(self._session, scope, receive, noting)
        except (aiohttp.ClientError, ConnectionError) as error:
            if has_begun:
                raise
            log.warning("the first front end does not answer: %r", error)
            await respond(ServerBusy(_UNREACHABLE))(scope, receive, send)

    async def _pass_on(
        self, session: aiohttp.ClientSession, scope: Scope, receive: Receive, send: Send
    ) -> None:
        query = scope["query_string"].decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        async with session.request(
            scope["method"],
            _as_it_is(f"http://front-end{path}{'?' + query if query else ''}"),
            headers=_request_headers(scope),
            data=_body(receive) if _has_body(scope) else None,
            allow_redirects=False,
        ) as response:
            headers = [
                (name.lower(), value)
                for name, value in response.raw_headers
                if name.lower() not in _OF_CONNECTION
            ]
            await send(
                {"type": "http.response.start", "status": response.status, "headers": headers}
            )
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def _as_it_is(text: str) -> URL:
    """A URL that is not normalized."""
    return URL(text, encoded=True)


def _request_headers(scope: Scope) -> CIMultiDict[str]:
    kept = CIMultiDict[str]()
    for name, value in scope["headers"]:
        if name not in _OF_CONNECTION:
            kept.add(name.decode("latin-1"), value.decode("latin-1"))
    if (client := scope.get("client")) is not None:
        kept.add("X-Forwarded-For", client[0])
    kept.add("X-Forwarded-Proto", scope.get("scheme", "http"))
    return kept


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _body(receive: Callable[[], Awaitable[Message]]) -> AsyncIterator[bytes]:
    """Raises ConnectionError if the client leaves before it has sent everything."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client has left")
        if message.get("body"):
            yield message["body"]
        more = message.get("more_body", False)

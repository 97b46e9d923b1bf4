"""`Client` and `AsyncClient`: run the flows of `core`, with blocking calls or on an event loop."""

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import httpx

from saccade_client.answers import Answer, ImageCost, ModelCard
from saccade_client.core import Conversation, Core, Settings
from saccade_client.errors import SaccadeError
from saccade_client.flow import Flow, Pause, Send, Work, translated
from saccade_client.media import Document, MediaSource, Picture
from saccade_client.prepare import MessageLike
from saccade_client.stream import AsyncStream, Stream

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 10.0


class _Configured:
    """What both clients have in common."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        resize: bool = True,
        reuse: bool = True,
        quality: int = 90,
        retries: int = 4,
        timeout_s: float = 600.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """The arguments are explained at `core.Settings`."""
        self.settings = Settings(
            base_url, api_key, model, resize, reuse, quality, retries, timeout_s, headers or {}
        )
        self._core = Core(self.settings)

    @property
    def _options(self) -> dict[str, Any]:
        """Of httpx. Without TLS, and redirects to it are not followed, loading the certificates
        would only take 50 ms."""
        return {
            "headers": self._core.headers,
            "timeout": httpx.Timeout(self.settings.timeout_s, connect=_CONNECT_TIMEOUT_S),
            "verify": not self._core.url.startswith("http://"),
        }


class Client(_Configured):
    """A client with blocking calls, which threads may share.

    `options` of a call are fields of the request, such as `model`, `temperature`, `max_tokens` (of
    the answer), `max_image_tokens` or `response_format`. All calls raise the errors of
    `saccade_client.errors`.
    """

    def ask(
        self,
        question: str,
        *media: MediaSource,
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Answer:
        """Ask about pictures, PDFs and videos, which are put before the question."""
        return self._run(
            self._core.ask(question, media, conversation=conversation, options=options)
        ).answer()

    def chat(
        self,
        messages: Sequence[MessageLike],
        *,
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Answer:
        """Send messages of the API; a content may be a list of texts, media and parts."""
        return self._run(
            self._core.start(messages, conversation=conversation, options=options)
        ).answer()

    def stream(
        self,
        question: str,
        *media: MediaSource,
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Stream:
        """As `ask`; the answer comes in pieces of text, or in `chunks`."""
        return Stream(
            self._run(
                self._core.ask(
                    question, media, conversation=conversation, options=options, stream=True
                )
            )
        )

    def messages(self, messages: Sequence[MessageLike]) -> list[dict[str, Any]]:
        """Messages with media as plain JSON, resized, for any other client of the API."""
        return self._run(self._core.messages(messages))

    def costs(self, *media: MediaSource, max_image_tokens: int | None = None) -> list[ImageCost]:
        """What pictures cost, in their order, without asking the model. Only Saccade answers."""
        return self._run(self._core.costs(media, max_image_tokens))

    def models(self) -> list[ModelCard]:
        """The models that the server offers."""
        return self._run(self._core.models())

    def upload(self, source: MediaSource, *, lifetime_s: int | None = None) -> Picture | Document:
        """Upload a picture or a PDF once, and get a reference to send in its place."""
        return self._run(self._core.upload(source, lifetime_s))

    def delete(self, file_id: str) -> None:
        """Delete an upload."""
        self._run(self._core.delete(file_id))

    def metrics(self) -> str:
        """The server's metrics, in the text format of Prometheus."""
        return self._run(self._core.metrics())

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def _http(self) -> httpx.Client:
        return httpx.Client(**self._options)

    def _run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    result = self._do(step)
                except SaccadeError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as end:
            done: T = end.value
            return done

    def _do(self, step: Send | Pause | Work) -> Any:
        if isinstance(step, Work):
            return step.call()
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        with translated():
            response = self._http.send(_request(self._http, step), stream=step.stream)
            if step.stream and not response.is_success:
                response.read()
            return response


class AsyncClient(_Configured):
    """As `Client`, for an event loop. Pictures are read and resized in threads."""

    async def ask(
        self,
        question: str,
        *media: MediaSource,
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Answer:
        """Ask about pictures, PDFs and videos, which are put before the question."""
        started = await self._run(
            self._core.ask(question, media, conversation=conversation, options=options)
        )
        return started.answer()

    async def chat(
        self,
        messages: Sequence[MessageLike],
        *,
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Answer:
        """Send messages of the API; a content may be a list of texts, media and parts."""
        started = await self._run(
            self._core.start(messages, conversation=conversation, options=options)
        )
        return started.answer()

    async def stream(
        self,
        question: str,
        *media: MediaSource,
        conversation: Conversation | None = None,
        **options: Any,
    ) -> AsyncStream:
        """As `ask`; the answer comes in pieces of text, or in `chunks`."""
        started = await self._run(
            self._core.ask(question, media, conversation=conversation, options=options, stream=True)
        )
        return AsyncStream(started)

    async def messages(self, messages: Sequence[MessageLike]) -> list[dict[str, Any]]:
        """Messages with media as plain JSON, resized, for any other client of the API."""
        return await self._run(self._core.messages(messages))

    async def costs(
        self, *media: MediaSource, max_image_tokens: int | None = None
    ) -> list[ImageCost]:
        """What pictures cost, in their order, without asking the model. Only Saccade answers."""
        return await self._run(self._core.costs(media, max_image_tokens))

    async def models(self) -> list[ModelCard]:
        """The models that the server offers."""
        return await self._run(self._core.models())

    async def upload(
        self, source: MediaSource, *, lifetime_s: int | None = None
    ) -> Picture | Document:
        """Upload a picture or a PDF once, and get a reference to send in its place."""
        return await self._run(self._core.upload(source, lifetime_s))

    async def delete(self, file_id: str) -> None:
        """Delete an upload."""
        await self._run(self._core.delete(file_id))

    async def metrics(self) -> str:
        """The server's metrics, in the text format of Prometheus."""
        return await self._run(self._core.metrics())

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @functools.cached_property
    def _http(self) -> httpx.AsyncClient:
        # The batch helper bounds how many requests run; the pool does not.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        return httpx.AsyncClient(**self._options, limits=limits)

    async def _run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._do(step)
                except SaccadeError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as end:
            done: T = end.value
            return done

    async def _do(self, step: Send | Pause | Work) -> Any:
        if isinstance(step, Work):
            return await asyncio.to_thread(step.call)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        with translated():
            response = await self._http.send(_request(self._http, step), stream=step.stream)
            if step.stream and not response.is_success:
                await response.aread()
            return response


def _request(http: httpx.Client | httpx.AsyncClient, send: Send) -> httpx.Request:
    return http.build_request(
        send.method, send.url, content=send.content, headers=send.headers, files=send.files
    )

"""An answer that arrives piece by piece, as events of server-sent events."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Self

from pydantic import ValidationError

from saccade_client.answers import Answer, Chunk, ChunkChoice
from saccade_client.core import Started
from saccade_client.errors import ConnectionLost, SaccadeError, UnexpectedAnswer, api_error
from saccade_client.flow import translated

_DATA = "data:"


class _Choice:
    """One of the answers, as far as it has arrived."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": ""}
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None

    def add(self, choice: ChunkChoice) -> None:
        """Texts of the same name belong together, such as `content` and `reasoning`."""
        self._finish_reason = choice.finish_reason or self._finish_reason
        for name, value in choice.delta.model_dump(exclude={"role", "tool_calls"}).items():
            if isinstance(value, str):
                self._message[name] = (self._message.get(name) or "") + value
        for position, call in enumerate(choice.delta.tool_calls or ()):
            number = call.get("index", position)
            _merge(self._tool_calls.setdefault(number, {}), call)

    def written(self, index: int) -> dict[str, Any]:
        """The choice as in an answer that is not streamed."""
        message = dict(self._message)
        if self._tool_calls:
            message["tool_calls"] = [call for _, call in sorted(self._tool_calls.items())]
        return {"index": index, "message": message, "finish_reason": self._finish_reason}


def _merge(call: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the next part of a tool call: its arguments come in pieces, all else at once."""
    for name, value in more.items():
        if name == "arguments":
            call[name] = call.get(name, "") + (value or "")
        elif isinstance(value, Mapping):
            _merge(call.setdefault(name, {}), value)
        elif value is not None and name != "index":
            call[name] = value


class _Events:
    """Collects the events of a stream into an answer."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._document: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        self._is_done = False

    def chunk(self, line: str) -> Chunk | None:
        """The chunk in a line of the stream, if it has one. Raises ApiError if the server has
        failed."""
        if not line.startswith(_DATA):
            return None
        data = line[len(_DATA) :].strip()
        if data == "[DONE]":
            self._is_done = True
            return None
        try:
            event = json.loads(data)
        except ValueError:
            raise UnexpectedAnswer("an event of the stream is not JSON") from None
        if not isinstance(event, dict):
            raise UnexpectedAnswer("an event of the stream is not a JSON object")
        if error := event.get("error"):
            status = error.get("code") if isinstance(error, dict) else None
            raise api_error(status if isinstance(status, int) else 200, data)
        event = {key: value for key, value in event.items() if value is not None}
        try:
            chunk = Chunk.model_validate(event)
        except ValidationError as failure:
            raise UnexpectedAnswer(f"an event of the stream is no chunk: {failure}") from None
        self._document |= event
        for choice in chunk.choices:
            self._choices.setdefault(choice.index, _Choice()).add(choice)
        return chunk

    def answer(self) -> Answer:
        """The whole answer, at the end of the stream. Raises ConnectionLost if it is cut off."""
        if not self._is_done:
            raise ConnectionLost("the stream ended before the answer was complete")
        found = self._choices or {0: _Choice()}
        choices = [choice.written(index) for index, choice in sorted(found.items())]
        return self._started.answer({**self._document, "choices": choices})


class _Streamed:
    def __init__(self, started: Started) -> None:
        self._response = started.response
        self._events = _Events(started)
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, with its usage, once the stream has been read."""
        if self._answer is None:
            raise SaccadeError("the stream has not been read to its end")
        return self._answer


class Stream(_Streamed):
    """Pieces of text as they arrive, or `chunks` with everything; then `answer` has all of it.
    Leaving it early, as a context manager or by `close`, stops the server's work."""

    def __iter__(self) -> Iterator[str]:
        return (chunk.text for chunk in self.chunks() if chunk.text)

    def chunks(self) -> Iterator[Chunk]:
        """The events of the stream as they arrive: text, tool calls, finish reasons, usage."""
        with self, translated():
            for line in self._response.iter_lines():
                if (chunk := self._events.chunk(line)) is not None:
                    yield chunk
            self._answer = self._events.answer()

    def close(self) -> None:
        """End the connection."""
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStream(_Streamed):
    """As `Stream`, for `async for`."""

    async def __aiter__(self) -> AsyncIterator[str]:
        async for chunk in self.chunks():
            if chunk.text:
                yield chunk.text

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The events of the stream as they arrive: text, tool calls, finish reasons, usage."""
        async with self:
            with translated():
                async for line in self._response.aiter_lines():
                    if (chunk := self._events.chunk(line)) is not None:
                        yield chunk
                self._answer = self._events.answer()

    async def close(self) -> None:
        """End the connection."""
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

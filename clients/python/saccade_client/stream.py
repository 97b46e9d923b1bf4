"""An answer that arrives piece by piece, as events of server-sent events."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from saccade_client.answers import Answer
from saccade_client.core import Started
from saccade_client.errors import ConnectionFailed, SaccadeError, UnexpectedAnswer, api_error
from saccade_client.flow import translated

_DATA = "data:"


class _Events:
    """Collects the events of a stream into an answer."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._document: dict[str, Any] = {}
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._is_done = False

    def piece(self, line: str) -> str:
        """The text that a line of the stream adds. Raises ApiError if the server has failed."""
        if not line.startswith(_DATA):
            return ""
        data = line[len(_DATA) :].strip()
        if data == "[DONE]":
            self._is_done = True
            return ""
        try:
            event = json.loads(data)
        except ValueError:
            raise UnexpectedAnswer("an event of the stream is not JSON") from None
        if not isinstance(event, dict):
            raise UnexpectedAnswer("an event of the stream is not a JSON object")
        if error := event.get("error"):
            status = error.get("code") if isinstance(error, dict) else None
            raise api_error(status if isinstance(status, int) else 200, data)
        self._document |= {key: value for key, value in event.items() if value is not None}
        text = ""
        for choice in event.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or ""
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._texts.append(text)
        return text

    def answer(self) -> Answer:
        """The whole answer, at the end of the stream. Raises ConnectionFailed if it is cut off."""
        if not self._is_done:
            raise ConnectionFailed("the stream ended before the answer was complete")
        message = {"role": "assistant", "content": "".join(self._texts)}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        return self._started.answer({**self._document, "choices": [choice]})


class _Streamed:
    def __init__(self, started: Started) -> None:
        self._response = started.response
        self._events = _Events(started)
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has been read."""
        if self._answer is None:
            raise SaccadeError("the stream has not been read to its end")
        return self._answer


class Stream(_Streamed):
    """Pieces of text as they arrive; then `answer` has all of it. Leaving it early, as a context
    manager or by `close`, stops the server's work."""

    def __iter__(self) -> Iterator[str]:
        with self, translated():
            for line in self._response.iter_lines():
                if piece := self._events.piece(line):
                    yield piece
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
        async with self:
            with translated():
                async for line in self._response.aiter_lines():
                    if piece := self._events.piece(line):
                        yield piece
                self._answer = self._events.answer()

    async def close(self) -> None:
        """End the connection."""
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

"""Streams: which events are sent together, and how a stream ends after a failure."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message

from server.http.stream import EventStream, TextEvents

Events = AsyncGenerator[str, None]
Write = Callable[[bytes, bool], Awaitable[None]]
Complete = Callable[[dict[str, Any]], None]
KEEP_ALIVE = b": keep-alive\n\n"


async def no_message() -> Message:
    raise AssertionError("the stream listens for the client")


class Sent:
    """The messages of a stream; `send` can fail from a given message on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.messages: list[Message] = []
        self.ended = 0
        self._fails_at = fails_at

    async def send(self, message: Message) -> None:
        await asyncio.sleep(0)  # like a client that reads slowly
        if len(self.messages) == self._fails_at:
            raise OSError("gone")
        self.messages.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages[1:]]

    async def answer(self, events: Events) -> None:
        def on_end() -> None:
            self.ended += 1

        await EventStream(events, on_end)({"type": "http"}, no_message, self.send)


def run(events: Events, fails_at: int | None = None) -> Sent:
    sent = Sent(fails_at)
    asyncio.run(sent.answer(events))
    return sent


def test_ready_events_are_sent_together() -> None:
    async def events() -> Events:
        yield "role "
        yield "first "
        await asyncio.sleep(0.001)
        yield "second "
        await asyncio.sleep(0)
        yield "last "
        yield "usage "
        yield "[DONE]"

    sent = run(events())
    assert sent.bodies == [b"role first ", b"second ", b"last usage [DONE]"]
    assert [message.get("more_body", False) for message in sent.messages[1:]] == [True, True, False]
    assert sent.messages[0]["headers"] == [(b"content-type", b"text/event-stream; charset=utf-8")]
    assert sent.ended == 1


def test_an_empty_stream_ends() -> None:
    async def events() -> Events:
        for event in ():
            yield event

    assert run(events()).bodies == [b""]


def test_a_stream_may_end_with_an_awaited_event() -> None:
    async def events() -> Events:
        yield "one"
        await asyncio.sleep(0)

    assert run(events()).bodies == [b"one", b""]


def test_the_number_of_ready_events_is_bounded() -> None:
    async def events() -> Events:
        for _ in range(40):
            yield "x" * 10_000

    bodies = run(events()).bodies
    assert b"".join(bodies) == b"x" * 400_000
    assert max(map(len, bodies)) <= 64 * 1024 + 10_000


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_the_generator_is_closed_when_sending_fails(fails_at: int) -> None:
    ended: list[str] = []

    async def events() -> Events:
        try:
            yield "one"
            await asyncio.sleep(0)
            yield "two"
            await asyncio.sleep(0)
            yield "three"
        finally:
            await asyncio.sleep(0)  # as vLLM does, to abort its request
            ended.append("ended")

    sent = Sent(fails_at)
    with pytest.raises(OSError, match="gone"):
        asyncio.run(sent.answer(events()))
    assert ended == (["ended"] if fails_at else [])  # else it was never started
    assert sent.ended == 1


def cancelled_while(wait: Callable[[asyncio.Event], Awaitable[None]]) -> list[str]:
    """The generator's log after its task is cancelled during `wait`."""
    noted: list[str] = []

    async def test() -> None:
        waiting = asyncio.Event()

        async def events() -> Events:
            yield "one"
            try:
                await wait(waiting)
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                noted.append("cancelled")
                raise

        sent = Sent()
        task = asyncio.create_task(sent.answer(events()))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        noted.append(f"sent {sent.bodies}")

    asyncio.run(test())
    return noted


def test_cancelling_the_task_cancels_the_generator() -> None:
    async def wait(waiting: asyncio.Event) -> None:
        asyncio.get_running_loop().call_later(0.01, waiting.set)
        await asyncio.sleep(60)

    assert cancelled_while(wait) == ["cancelled", "sent [b'one']"]


def test_cancelling_the_task_during_a_send_cancels_the_generator() -> None:
    async def wait(waiting: asyncio.Event) -> None:
        waiting.set()
        await asyncio.sleep(60)

    assert cancelled_while(wait) == ["cancelled", "sent []"]


def test_a_timeout_in_the_generator_is_raised_in_it() -> None:
    async def events() -> Events:
        yield "one"
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            yield "late"

    assert run(events()).bodies == [b"one", b"late"]


def test_an_exception_in_the_generator_is_propagated() -> None:
    async def events() -> Events:
        yield "one"
        await asyncio.sleep(0)
        raise ValueError("broken")

    sent = Sent()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(sent.answer(events()))
    assert (sent.bodies, sent.ended) == ([b"one"], 1)


def test_a_comment_is_sent_while_a_text_is_silent() -> None:
    class Text:
        async def write(self, write: Write, complete: Complete, *, in_callback: bool) -> None:
            while sent.bodies.count(KEEP_ALIVE) < 3:
                await asyncio.sleep(0.001)
            await write(b"first ", True)
            while sent.bodies[-1] != KEEP_ALIVE:
                await asyncio.sleep(0.001)
            await write(b"last", False)

    sent = Sent()
    ended: list[None] = []
    answer = TextEvents(Text(), None, 0.01, lambda: ended.append(None))
    asyncio.run(answer({"type": "http"}, no_message, sent.send))
    assert [body for body in sent.bodies if body != KEEP_ALIVE] == [b"first ", b"last"]
    assert [message["more_body"] for message in sent.messages[1:]][-2:] == [True, False]
    assert sent.bodies[-1] == b"last"
    assert len(ended) == 1


@pytest.mark.parametrize("keep_alive_s", [0, 0.01])
def test_a_text_whose_client_is_gone_ends(keep_alive_s: float) -> None:
    class Text:
        async def write(self, write: Write, complete: Complete, *, in_callback: bool) -> None:
            await write(b"first ", True)

    sent = Sent(fails_at=1)
    ended: list[None] = []
    answer = TextEvents(Text(), None, keep_alive_s, lambda: ended.append(None))
    with pytest.raises(OSError, match="gone"):
        asyncio.run(answer({"type": "http"}, no_message, sent.send))
    assert len(ended) == 1

"""Messages to and from the engine core arrive whole, in order, and end with their task."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvloop
import zmq
import zmq.asyncio

from server.engine.vllm_adapter.core_sockets import InputSocket, OutputSocket

Run = Callable[[Coroutine[Any, Any, None]], None]
BLOCK = os.urandom(1 << 20)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    started: Run = request.param
    return started


@pytest.fixture
def context() -> Any:
    with zmq.Context() as found:
        yield found


def test_outputs_arrive_whole_and_in_order(run: Run, context: Any) -> None:
    async def main() -> None:
        with (
            zmq.asyncio.Context.shadow(context).socket(zmq.PULL) as inner,
            context.socket(zmq.PUSH) as core,
        ):
            core.connect(f"tcp://127.0.0.1:{inner.bind_to_random_port('tcp://127.0.0.1')}")
            outputs = OutputSocket(inner)
            for burst in (1, 5, 1):
                receiving = asyncio.create_task(received(outputs, burst))
                await asyncio.sleep(0.02)  # it waits by now
                for number in range(burst):
                    core.send_multipart([str(number).encode(), BLOCK])
                assert await asyncio.wait_for(receiving, 10) == [
                    [str(number).encode(), BLOCK] for number in range(burst)
                ]

    run(main())


def test_messages_that_nobody_waits_for_do_not_keep_the_event_loop_busy(
    run: Run, context: Any
) -> None:
    async def main() -> None:
        with (
            zmq.asyncio.Context.shadow(context).socket(zmq.PULL) as inner,
            context.socket(zmq.PUSH) as core,
        ):
            core.connect(f"tcp://127.0.0.1:{inner.bind_to_random_port('tcp://127.0.0.1')}")
            outputs = OutputSocket(inner)
            receiving = asyncio.create_task(received(outputs, 1))
            await asyncio.sleep(0.02)
            for number in range(3):
                core.send(b"%d" % number)
            assert await receiving == [[b"0"]]
            await asyncio.sleep(0.1)
            used = time.thread_time()
            await asyncio.sleep(0.5)
            assert time.thread_time() - used < 0.25
            assert await received(outputs, 2) == [[b"1"], [b"2"]]

    run(main())


async def received(outputs: OutputSocket, count: int) -> list[list[bytes]]:
    messages = [await outputs.recv_multipart(copy=False) for _ in range(count)]
    return [[frame.bytes for frame in message] for message in messages]


def test_the_task_that_receives_can_be_cancelled_after_the_socket_is_closed(
    run: Run, context: Any
) -> None:
    """This is how vLLM shuts down."""

    async def main() -> None:
        inner = zmq.asyncio.Context.shadow(context).socket(zmq.PULL)
        inner.bind_to_random_port("tcp://127.0.0.1")
        files = set(os.listdir("/proc/self/fd"))
        receiving = asyncio.create_task(OutputSocket(inner).recv_multipart())
        await asyncio.sleep(0.02)
        inner.close()
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        assert set(os.listdir("/proc/self/fd")) <= files

    run(main())


def test_requests_are_sent_whole_and_in_order(run: Run, context: Any) -> None:
    async def main() -> None:
        with (
            zmq.asyncio.Context.shadow(context).socket(zmq.ROUTER) as inner,
            context.socket(zmq.DEALER) as core,
        ):
            core.setsockopt(zmq.IDENTITY, b"core")
            core.setsockopt(zmq.RCVTIMEO, 10_000)
            core.connect(f"tcp://127.0.0.1:{inner.bind_to_random_port('tcp://127.0.0.1')}")
            core.send(b"ready")
            assert await inner.recv_multipart() == [b"core", b"ready"]
            inputs = InputSocket(inner)
            for number in range(3):
                await inputs.send_multipart((b"core", b"%d" % number, BLOCK), copy=False)
            for number in range(3):
                assert core.recv_multipart() == [b"%d" % number, BLOCK]

    run(main())


def test_a_request_waits_while_the_queue_of_the_socket_is_full(run: Run, context: Any) -> None:
    async def main() -> None:
        with (
            zmq.asyncio.Context.shadow(context).socket(zmq.PUSH) as inner,
            context.socket(zmq.PULL) as core,
        ):
            for end in (inner, core):
                end.setsockopt(zmq.SNDHWM if end is inner else zmq.RCVHWM, 1)
            core.bind("inproc://core")
            inner.connect("inproc://core")
            inputs = InputSocket(inner)
            count = 8
            sending = [inputs.send_multipart([b"%d" % number]) for number in range(count)]
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(gathered(sending)), 0.05)
            got = []
            for _ in range(count):
                got.append(await asyncio.to_thread(core.recv))
                await asyncio.sleep(0.01)
            assert got == [b"%d" % number for number in range(count)]

    run(main())


async def gathered(sending: list[Awaitable[Any]]) -> None:
    for each in sending:
        await each

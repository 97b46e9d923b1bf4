"""Messages to and from vLLM's engine core without the futures of pyzmq.

Each step of the engine is a message, and each request. pyzmq makes a future, an event and several
enums for each one, and looks twice whether the next one is there: more of the event loop's time
than decoding a message takes.
"""

import asyncio
import os
from collections.abc import Awaitable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from vllm.v1.engine.core_client import AsyncMPClient
from zmq.backend import zmq_poll

from server.concurrency import DONE

# As plain numbers: each operation on pyzmq's flags makes an enum.
_POLLIN, _DONTWAIT, _SNDMORE = int(zmq.POLLIN), int(zmq.DONTWAIT), int(zmq.SNDMORE)


def has_message(socket: Any) -> bool:
    """Whether a message can be received from a socket of pyzmq; `socket.get` would make an enum."""
    return bool(zmq_poll([(socket, _POLLIN)], 0))


def install() -> None:
    """Let vLLM's engine core clients send and receive here."""
    client: Any = AsyncMPClient
    ensure_task = client._ensure_output_queue_task

    def ensure_receiving_task(self: AsyncMPClient) -> None:
        resources = self.resources
        if resources.output_queue_task is None:
            outputs: Any = resources.output_socket
            outputs.recv_multipart = OutputSocket(outputs).recv_multipart
            inputs: Any = self.input_socket
            inputs.send_multipart = InputSocket(inputs).send_multipart
            ensure_task(self)

    client._ensure_output_queue_task = ensure_receiving_task


class InputSocket:
    """Stands in for `send_multipart` of a socket from which nothing is received any more."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._send_later = socket.send_multipart
        self._socket: Any = zmq.Socket.shadow(socket)
        self._last_put_off: Any = None

    def send_multipart(self, parts: Sequence[Any], copy: bool = True) -> Awaitable[Any]:
        """Send a message, at once unless the socket's queue is full."""
        if self._last_put_off is not None and not self._last_put_off.done():
            return self._put_off(parts, copy)
        *others, last = parts
        try:
            for part in others:  # once the first is taken, all are
                self._socket.send(part, _DONTWAIT | _SNDMORE, copy=copy)
            self._socket.send(last, _DONTWAIT, copy=copy)
        except zmq.Again:
            return self._put_off(parts, copy)
        return DONE

    def _put_off(self, parts: Sequence[Any], copy: bool) -> Awaitable[Any]:
        self._last_put_off = self._send_later(parts, copy=copy)
        return self._last_put_off  # type: ignore[no-any-return]


class OutputSocket:
    """Stands in for `recv_multipart` of a socket that nothing else reads. One task may wait at a
    time."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket: Any = zmq.Socket.shadow(socket)
        self._loop = asyncio.get_running_loop()
        # A descriptor of its own: pyzmq closes the socket's before it cancels who waits for it.
        self._fd = os.dup(self._socket.fileno())
        self._is_watched = False
        self._arrived: asyncio.Future[None] | None = None

    async def recv_multipart(self, copy: bool = False) -> list[zmq.Frame]:
        """The frames of the next message. When this is cancelled or fails, the socket can no
        longer be read."""
        assert not copy
        socket = self._socket
        try:
            # To look is also what makes the descriptor readable for the next message.
            while not has_message(socket):
                self._arrived = self._loop.create_future()
                if not self._is_watched:
                    self._loop.add_reader(self._fd, self._wake)
                    self._is_watched = True
                await self._arrived
            frames: list[zmq.Frame] = [socket.recv(_DONTWAIT, copy=False)]
            while frames[-1].more:
                frames.append(socket.recv(_DONTWAIT, copy=False))
        except BaseException:
            self._close()
            raise
        return frames

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        else:  # nobody looks at the socket, so the descriptor stays readable
            self._loop.remove_reader(self._fd)
            self._is_watched = False

    def _close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

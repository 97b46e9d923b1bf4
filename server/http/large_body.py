"""Reads large request bodies past uvloop and uvicorn.

On their way, each piece of a body is copied four times on the event loop: by uvloop, by the parser,
into uvicorn's buffer and out of it. Here the event loop only waits until much of a body has
arrived, and a thread receives it from the socket, without the GIL.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

# A smaller rest of a body is not worth a thread.
LEAST_BYTES = 256 * 1024
# The event loop is woken, and a thread is, when so much has arrived.
_WAKE_BYTES = 1 << 20
_MOST_PIECE_BYTES = 4 << 20
# A client that sends this fast keeps its thread until its body has arrived.
_LINGER_S = 0.003

_threads = ThreadPoolExecutor(4, "bodies")


class LargeBody:
    """The rest of a body, of which `left` bytes have not been received. `with` it, nothing else may
    read from the connection.

    Attributes:
        has_ended: no more bytes can be received.
    """

    def __init__(self, fd: int, left: int, on_end: Callable[[int], None]) -> None:
        """`fd` is the connection's socket. `on_end` is called on the event loop, when nothing is
        read here any more, with the number of bytes that are left.

        Raises:
            OSError: no file descriptor is free.
        """
        self.left = left
        self.has_ended = False
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        # A descriptor of its own: uvloop may close the connection's while a thread reads from it.
        copy = os.dup(fd)
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, copy)
        except BaseException:
            os.close(copy)
            raise
        self._arrived: asyncio.Future[list[bytes]] | None = None
        self._is_first = True
        self._is_receiving = self._is_closed = False

    def __enter__(self) -> "LargeBody":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_closed = True
        if not self._is_receiving:
            self._finish()

    def stop(self) -> None:
        """The connection is closed."""
        self.has_ended = True
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result([])

    async def pieces(self, wait_s: float) -> list[bytes]:
        """The next bytes of the body, as soon as there are many; those that there are after
        `wait_s`, which may be none."""
        much_has_arrived = self._is_first or await self._much_has_arrived(wait_s)
        self._is_first = False
        if self.has_ended:
            return []
        self._arrived = self._loop.create_future()
        self._is_receiving = True
        _threads.submit(self._receive, _LINGER_S if much_has_arrived else 0.0)
        return await self._arrived

    async def _much_has_arrived(self, wait_s: float) -> bool:
        arrived = self._arrived = self._loop.create_future()
        self._loop.add_reader(self._socket.fileno(), _wake, arrived)
        try:
            async with asyncio.timeout(wait_s):
                await arrived
        except TimeoutError:
            return False
        finally:
            self._loop.remove_reader(self._socket.fileno())
        return True

    # ------------------------------------------------------------------ in a thread

    def _receive(self, linger_s: float) -> None:
        pieces: list[bytes] = []
        has_ended = False
        try:
            has_ended = self._receive_into(pieces, self.left, linger_s)
        except (TimeoutError, BlockingIOError):
            pass
        except OSError:
            has_ended = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._received, pieces, has_ended)

    def _receive_into(self, pieces: list[bytes], left: int, linger_s: float) -> bool:
        """Add what arrives to `pieces`; returns whether the client has closed the connection."""
        self._socket.settimeout(linger_s)
        while left:
            self._wake_at(min(left, _WAKE_BYTES))
            piece = self._socket.recv(min(left, _MOST_PIECE_BYTES))
            if not piece:
                return True
            pieces.append(piece)
            left -= len(piece)
        return False

    def _wake_at(self, nbytes: int) -> None:
        """Let the kernel report data when there are `nbytes`. Without this, there are more, smaller
        pieces."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)

    # ------------------------------------------------------------------ on the event loop

    def _received(self, pieces: list[bytes], has_ended: bool) -> None:
        self._is_receiving = False
        self.left -= sum(map(len, pieces))
        self.has_ended |= has_ended
        if self._is_closed:
            self._finish()
        elif self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(pieces)

    def _finish(self) -> None:
        self._wake_at(1)
        self._socket.close()
        self._on_end(self.left)


def _wake(arrived: "asyncio.Future[list[bytes]]") -> None:
    if not arrived.done():
        arrived.set_result([])

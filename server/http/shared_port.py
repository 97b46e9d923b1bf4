"""A listening socket from which several front ends accept connections.

asyncio's server would accept all that are waiting in whichever process wakes first. Here one that
has more connections than another leaves the next one to that, for a short time: it may be busy.
"""

import asyncio
import logging
import socket
from typing import Any

import uvicorn

from server.front_ends import NOT_ACCEPTING, FrontEnd

log = logging.getLogger("saccade")

_DEFER_S = 0.001
_MOST_DEFERRALS = 5
# After an error, such as too many open files. asyncio waits as long.
_PAUSE_S = 1.0


class SharedPort:
    """Accepts connections for `server` until it is closed; takes the place of asyncio's server."""

    def __init__(self, sock: socket.socket, mine: FrontEnd, server: uvicorn.Server) -> None:
        sock.listen(server.config.backlog)
        sock.setblocking(False)
        self._sock = sock
        self._mine = mine
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._deferrals = 0
        self._connecting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._watch()

    def close(self) -> None:
        """Accept no more. Connections that were accepted go on."""
        self._is_closed = True
        self._mine.loads[self._mine.index] = NOT_ACCEPTING
        self._loop.remove_reader(self._sock)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        self._timer = None
        self._publish()
        self._loop.add_reader(self._sock, self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock)
        self._timer = self._loop.call_later(seconds, self._watch)

    def _publish(self) -> None:
        """Tell the others how many connections this one has."""
        open_now = len(self._server.server_state.connections) + len(self._connecting)
        self._mine.loads[self._mine.index] = open_now

    def _accept(self) -> None:
        self._publish()
        loads = self._mine.loads
        if loads[self._mine.index] > min(loads) and self._deferrals < _MOST_DEFERRALS:
            self._deferrals += 1
            self._pause(_DEFER_S)
            return
        self._deferrals = 0
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another one has it
        except OSError as error:
            log.error("failed to accept a connection: %s", error)
            self._pause(_PAUSE_S)
            return
        # A task of its own, so that a TLS handshake does not delay the next one.
        task = self._loop.create_task(self._connect(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        self._publish()

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._protocol, connection, ssl=self._server.config.ssl
            )
        except (OSError, TimeoutError) as error:  # such as a TLS handshake that fails
            log.debug("a connection failed to start: %s", error)
            connection.close()

    def _protocol(self) -> asyncio.Protocol:
        made: Any = self._server.config.http_protocol_class
        protocol: asyncio.Protocol = made(
            config=self._server.config,
            server_state=self._server.server_state,
            app_state=self._server.lifespan.state,
            _loop=self._loop,
        )
        return protocol

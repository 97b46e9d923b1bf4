"""The end of the HTTP server without a lost request: closes the port, and lets requests finish."""

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterable, Sequence

from server.http.protocol import Connection, ServerState

_POLL_S = 0.05
# For connections that the kernel has established to reach the event loop, through TLS as well.
_SETTLE_S = 0.25
_MOST_SETTLE_S = 2.0
# For the requests that are cut off to send their error, and for the transports to pass it on.
_CUT_S = 1.0

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Classic BPF on a TCP segment, by the flags in its byte 13: (code, jump if true, if false, value).
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x12),  # and SYN | ACK
    (0x15, 0, 1, 0x02),  # only SYN?
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # accept
)
# In `struct tcp_info` of a listening socket, tcpi_unacked counts the connections to be accepted.
_UNACKED_AT = 24


async def close_port(
    servers: Iterable[asyncio.Server], sockets: Sequence[socket.socket], state: ServerState
) -> None:
    """Stop listening. Unless `state.must_end`, no established connection is reset.

    Closing a socket resets the connections in its queue, whose clients may have sent a request and,
    if it is a POST, do not repeat it. So the kernel is told to ignore new attempts first. Their
    clients repeat these after a second and are refused, which proxies answer with another server.
    """
    listening = [sock for sock in sockets if sock.family in (socket.AF_INET, socket.AF_INET6)]
    if listening and not state.must_end:
        with contextlib.suppress(OSError):  # some sandboxes do not emulate this
            await _empty_queues(listening)
    for server in servers:
        server.close()
    for sock in sockets:
        sock.close()


async def _empty_queues(listening: Sequence[socket.socket]) -> None:
    for sock in listening:
        _ignore_new(sock)
    await asyncio.sleep(_SETTLE_S)
    deadline = asyncio.get_running_loop().time() + _MOST_SETTLE_S
    while any(map(_queued, listening)):
        await asyncio.sleep(_POLL_S)
        if asyncio.get_running_loop().time() > deadline:
            return


def _ignore_new(sock: socket.socket) -> None:
    """Let the kernel drop the first segment of each new connection to a listening TCP socket."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
    program = ctypes.create_string_buffer(code)
    pointer = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)


def _queued(sock: socket.socket) -> int:
    """How many established connections wait to be accepted."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED_AT + 4)
    (queued,) = struct.unpack_from("I", info, _UNACKED_AT)
    return int(queued)


async def finish(state: ServerState, until: float) -> bool:
    """Close connections as their requests end; returns whether all have ended by the time `until`
    of the event loop, or before `state.must_end` is set."""
    loop = asyncio.get_running_loop()
    for connection in list(state.connections):
        if not isinstance(connection, Connection):  # a websocket, which closes by itself
            connection.shutdown()
    while True:
        for connection in list(state.connections):
            if isinstance(connection, Connection):
                connection.shutdown()
        await asyncio.sleep(_POLL_S)
        if not (state.connections or state.tasks):
            return True
        if state.must_end or loop.time() >= until:
            return False


async def cut(state: ServerState) -> int:
    """Cancel the running requests, which send an error; returns how many there were."""
    tasks = list(state.tasks)
    for task in tasks:
        task.cancel("the server is shutting down")
    if tasks:
        await asyncio.wait(tasks, timeout=_CUT_S)
    for connection in list(state.connections):
        connection.shutdown()
    await asyncio.sleep(_POLL_S)
    return len(tasks)

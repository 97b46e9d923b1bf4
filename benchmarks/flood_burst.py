"""A burst of requests at once, which takes no processor from the server.

Real clients are on other machines. Here they share its cores, so only the heads are sent at the
usual priority. What follows, the bodies and the reading of answers, is done by processes that run
when nothing else wants to (SCHED_IDLE). When an answer has come is what the kernel says of its
first segment, so that the time is that of the server, however late a client reads.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

# What the kernel takes of a body at a time: small, so that little is copied for requests that are
# refused.
_SEND_BUFFER_BYTES = 1 << 16
_PIECE_BYTES = 1 << 16
_RECEIVE_BYTES = 1 << 16
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; also the type of the message with the time
_TIME = struct.Struct("qq")  # struct timespec
_NS = 1_000_000_000


def burst(
    port: int,
    firsts: list[bytes],
    rest_of: Callable[[int], list[bytes]],
    seconds: float,
    on_answer: Callable[[int, float, bytes], None],
) -> None:
    """Send `firsts` on a connection each, and then `rest_of` their numbers, for `seconds`.

    `on_answer` gets the number, the seconds from when its first bytes were sent to when the answer
    came, and what came, or b"" when the server has closed the connection.
    """
    sockets = [socket.socket() for _ in firsts]
    began = []
    for each, first in zip(sockets, firsts, strict=True):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        note_arrivals(each)
        each.connect(("127.0.0.1", port))
        began.append(time.time_ns())
        each.sendall(first)
        each.setblocking(False)
    yield_processor()
    sender = os.fork()
    if not sender:
        _send_rests(sockets, rest_of)
    try:
        _receive(sockets, began, seconds, on_answer)
    finally:
        os.kill(sender, signal.SIGKILL)
        os.waitpid(sender, 0)
        for each in sockets:
            each.close()


def yield_processor() -> None:
    """Let this process run only when nothing else wants to."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def note_arrivals(sock: socket.socket) -> None:
    """Let the kernel note when data arrives, for `arrived`."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def arrived(sock: socket.socket) -> tuple[bytes, int]:
    """What has arrived, and when, on the clock of `time.time_ns`."""
    data, notes, _, _ = sock.recvmsg(_RECEIVE_BYTES, socket.CMSG_SPACE(_TIME.size))
    for _, kind, value in notes:
        if kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIME.unpack(value)
            return data, seconds * _NS + nanoseconds
    return data, time.time_ns()


def _receive(
    sockets: list[socket.socket],
    began: list[int],
    seconds: float,
    on_answer: Callable[[int, float, bytes], None],
) -> None:
    numbers = {each.fileno(): number for number, each in enumerate(sockets)}
    end = time.perf_counter() + seconds
    with select.epoll() as poll:
        for file in numbers:
            poll.register(file, select.EPOLLIN)
        while numbers and (left_s := end - time.perf_counter()) > 0:
            for file, _ in poll.poll(left_s):
                number = numbers[file]
                try:
                    received, at = arrived(sockets[number])
                except OSError:
                    received, at = b"", time.time_ns()
                on_answer(number, (at - began[number]) / _NS, received)
                if not received:
                    poll.unregister(file)
                    with contextlib.suppress(OSError):
                        sockets[number].shutdown(socket.SHUT_RDWR)  # nothing more is sent
                    del numbers[file]


def _send_rests(sockets: list[socket.socket], rest_of: Callable[[int], list[bytes]]) -> NoReturn:
    left = {
        each.fileno(): (each, deque(map(memoryview, rest_of(number))))
        for number, each in enumerate(sockets)
    }
    with select.epoll() as poll:
        for file in left:
            poll.register(file, select.EPOLLOUT)
        while left:
            for file, _ in poll.poll():
                each, pieces = left[file]
                try:
                    sent = each.send(pieces[0][:_PIECE_BYTES]) if pieces else 0
                except OSError:  # refused
                    pieces.clear()
                if pieces and (rest := pieces.popleft()[sent:]):
                    pieces.appendleft(rest)
                if not pieces:
                    poll.unregister(file)
                    del left[file]
    os._exit(0)

"""A burst of requests at once, with as little work as possible between a head and its answer.

Of the heads and the answers, one process takes care, and of the rest of each request a niced child:
bodies would otherwise keep it from reading answers, and the server from its processor.
"""

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

# What the kernel takes of a body at a time: small, so that little is copied for requests that are
# refused.
_SEND_BUFFER_BYTES = 1 << 16
_PIECE_BYTES = 1 << 16
_RECEIVE_BYTES = 1 << 16
_SENDER_NICENESS = 10


def burst(
    port: int,
    firsts: list[bytes],
    rest_of: Callable[[int], list[bytes]],
    seconds: float,
    on_answer: Callable[[int, float, bytes], None],
) -> None:
    """Send `firsts` on a connection each, and then `rest_of` their numbers, for `seconds`.

    `on_answer` gets the number, the seconds since its first bytes were sent, and what came, or b""
    when the server has closed the connection.
    """
    sockets = [socket.socket() for _ in firsts]
    began = []
    for each, first in zip(sockets, firsts, strict=True):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        each.connect(("127.0.0.1", port))
        began.append(time.perf_counter())
        each.sendall(first)
        each.setblocking(False)
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


def _receive(
    sockets: list[socket.socket],
    began: list[float],
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
                    received = sockets[number].recv(_RECEIVE_BYTES)
                except OSError:
                    received = b""
                on_answer(number, time.perf_counter() - began[number], received)
                if not received:
                    poll.unregister(file)
                    with contextlib.suppress(OSError):
                        sockets[number].shutdown(socket.SHUT_RDWR)  # nothing more is sent
                    del numbers[file]


def _send_rests(sockets: list[socket.socket], rest_of: Callable[[int], list[bytes]]) -> NoReturn:
    os.nice(_SENDER_NICENESS)
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

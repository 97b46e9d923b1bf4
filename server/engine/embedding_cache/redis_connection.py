"""Connections to Redis whose calls are bounded in time and in bytes.

redis-py's time-outs are for one read each, and it reads as much as its peer announces. A peer that
sends a byte from time to time would hold a thread forever, and one that sends gigabytes would fill
the memory. Here one `Allowance` covers all of a call: the lookup of the name, the connection, the
password and the reply.
"""

import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

import redis
from redis._parsers import _RESP2Parser
from redis.backoff import NoBackoff
from redis.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.retry import Retry


class ReplyTooLong(redis.ConnectionError):
    """The peer sent more than any reply to the call has."""


class Allowance(threading.local):
    """What the call of this thread may still take."""

    _until = 0.0
    _bytes_left = 0

    def start(self, seconds: float, reply_bytes: int) -> None:
        self._until = time.monotonic() + seconds
        self._bytes_left = reply_bytes

    def seconds_left(self) -> float:
        """Raises TimeoutError if the time is over."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the call took too long")
        return seconds

    def received(self, nbytes: int) -> None:
        """Raises ReplyTooLong if the peer has sent too much."""
        self._bytes_left -= nbytes
        if self._bytes_left < 0:
            raise ReplyTooLong("the reply is too long")


def bounded_pool(url: str, allowance: Allowance, connections: int) -> ConnectionPool:
    """At most `connections` to the `redis://`, `rediss://` or `unix://` URL, which take no more
    than `allowance`. Raises ValueError if `url` is invalid."""
    options = parse_url(url)  # type: ignore[no-untyped-call]
    kind = _BOUNDED[options.pop("connection_class", Connection)]
    ours = {
        "allowance": allowance,
        "max_connections": connections,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        # In version 3 of the protocol, the peer may push messages, some of which move the
        # connection to another server or lengthen its time-outs.
        "protocol": 2,
        "parser_class": _RESP2Parser,  # that of hiredis would read past the bounds
        "driver_info": None,  # two more round trips
    }
    return ConnectionPool(kind, **{**options, **ours})


class _BoundedSocket:
    """A socket that takes no more than `allowance`; without waiting if its time-out is 0."""

    def __init__(self, plain: Any, allowance: Allowance) -> None:
        self._plain = plain
        self._allowance = allowance
        self._waits = True

    def settimeout(self, seconds: float | None) -> None:
        self._waits = seconds != 0

    def recv(self, size: int) -> bytes:
        self._plain.settimeout(self._allowance.seconds_left() if self._waits else 0)
        data: bytes = self._plain.recv(size)
        self._allowance.received(len(data))
        return data

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self._plain.settimeout(self._allowance.seconds_left())
            left = left[self._plain.send(left) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


class _Bounded(AbstractConnection):
    """Goes before a class of connections."""

    def __init__(self, *, allowance: Allowance, **options: Any) -> None:
        self._allowance = allowance
        super().__init__(**options)

    def _connect(self) -> Any:
        self.socket_connect_timeout = self.socket_timeout = self._allowance.seconds_left()
        plain = super()._connect()  # type: ignore[safe-super, no-untyped-call]
        return _BoundedSocket(plain, self._allowance)


class _Dialling(Connection):
    """Tries all addresses of the host within the allowance."""

    _allowance: Allowance

    def _connect(self) -> Any:
        failure = OSError("the host has no address")
        found = _addresses(self.host, self.port, self._allowance)
        for number, (family, kind, proto, _, address) in enumerate(found):
            try:
                dialled = socket.socket(family, kind, proto)
            except OSError as error:  # such as of a kernel without IPv6
                failure = error
                continue
            try:
                dialled.settimeout(self._allowance.seconds_left() / (len(found) - number))
                dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                dialled.connect(address)
                dialled.settimeout(self._allowance.seconds_left())  # for a TLS handshake
            except OSError as error:
                dialled.close()
                failure = error
            else:
                return dialled
        raise failure


class _BoundedConnection(_Bounded, _Dialling):
    """To `redis://`."""


class _BoundedSSLConnection(_Bounded, SSLConnection, _Dialling):
    """To `rediss://`."""


class _BoundedUnixConnection(_Bounded, UnixDomainSocketConnection):
    """To `unix://`."""


_BOUNDED: dict[type[Any], type[Any]] = {
    Connection: _BoundedConnection,
    SSLConnection: _BoundedSSLConnection,
    UnixDomainSocketConnection: _BoundedUnixConnection,
}

_lookups: dict[tuple[str, int], "Future[list[Any]]"] = {}
_lookups_lock = threading.Lock()


def _addresses(host: str, port: int, allowance: Allowance) -> list[Any]:
    """The addresses of `host`, as from `getaddrinfo`.

    The system's resolver has no deadline, so it runs in a thread, one for all callers that ask for
    the same name; nobody waits for that thread when the process ends.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    with _lookups_lock:
        lookup = _lookups.get((host, port))
        if lookup is None:
            lookup = _lookups[host, port] = Future()
            threading.Thread(target=_look_up, args=(host, port, lookup), daemon=True).start()
    return lookup.result(allowance.seconds_left())


def _look_up(host: str, port: int, lookup: "Future[list[Any]]") -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except Exception as error:
        _forget(host, port)
        lookup.set_exception(error)
    else:
        _forget(host, port)
        lookup.set_result(found)


def _forget(host: str, port: int) -> None:
    with _lookups_lock:
        del _lookups[host, port]

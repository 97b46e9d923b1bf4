"""A real nameserver, over UDP and TCP, that answers for some names and misbehaves for others.

with nameserver(images_test="127.0.0.1") as dns:
    SystemLookup([dns.address])
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address

from tests.hostile_origin import WAIT_S

A, CNAME = 1, 5
RESPONSE, TRUNCATED = 0x8180, 0x8380
SERVFAIL, NXDOMAIN, REFUSED = 2, 3, 5
SLOW_S = 4.0


def _bound() -> tuple[socket.socket, socket.socket]:
    """Sockets for UDP and TCP at the same port. TCP chooses it: connections that have ended still
    hold many of its ports."""
    while True:
        udp, tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
        tcp.bind(("127.0.0.1", 0))
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            tcp.close()
            udp.close()
        else:
            return udp, tcp


class Nameserver:
    """Has the IPv4 addresses of some names. The start of a name decides how it misbehaves:

    `hanging`: no answer; `servfail`, `refused`: that error; `loop`: aliases that lead to each
    other; `garbage`: bytes that are no answer; `forged`: an answer to another question; `slow`:
    SLOW_S after the first question, as by a nameserver that has to ask others; `tcp`: over TCP
    only; `half`: over TCP only, which never answers; `many`, `huge`: 1000 and 4000 addresses, over
    TCP.

    Attributes:
        asked: the names that it was asked about.
        address: ADDRESS:PORT.
    """

    def __init__(self, **addresses: str) -> None:
        self.addresses = {name.replace("_", "."): text for name, text in addresses.items()}
        self.asked: list[str] = []
        self._known_at: dict[str, float] = {}
        self._stopping = threading.Event()
        self._udp, self._tcp = _bound()
        self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._tcp.listen(16)
        for listener in (self._udp, self._tcp):
            listener.settimeout(0.05)
        self.address = f"127.0.0.1:{self._udp.getsockname()[1]}"

    def serve_udp(self) -> None:
        """Answer until `stop` is called."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                query, client = self._udp.recvfrom(4096)
                if not query:  # c-ares also sends empty datagrams
                    continue
                name = _name(query)
                self.asked.append(name)
                if name.startswith("slow"):
                    known_at = self._known_at.setdefault(name, time.monotonic() + SLOW_S)
                    wait_s = max(0, known_at - time.monotonic())
                    timer = threading.Timer(wait_s, self._answer, [query, client])
                    timer.daemon = True
                    timer.start()
                else:
                    self._answer(query, client)
        self._udp.close()

    def serve_tcp(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._tcp.accept()
                threading.Thread(target=self._converse, args=(client,), daemon=True).start()
        self._tcp.close()

    def stop(self) -> None:
        self._stopping.set()

    def _answer(self, query: bytes, client: tuple[str, int]) -> None:
        reply = self._reply(query, over_tcp=False)
        if reply is not None:
            with contextlib.suppress(OSError):
                self._udp.sendto(reply, client)

    def _converse(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), client.makefile("rb") as stream:
            client.settimeout(WAIT_S)
            while start := stream.read(2):
                reply = self._reply(stream.read(int.from_bytes(start, "big")), over_tcp=True)
                if reply is not None:
                    client.sendall(len(reply).to_bytes(2, "big") + reply)

    def _reply(self, query: bytes, over_tcp: bool) -> bytes | None:
        name = _name(query)
        kind = name.rstrip("0123456789.").partition(".")[0].rstrip("0123456789")
        wants_ipv4 = _question(query)[-4:-2] == b"\0\1"
        needs_tcp = kind in ("tcp", "half", "many", "huge")
        if kind == "hanging" or (kind == "half" and over_tcp):
            return None
        if kind == "garbage":
            return query[:2] + b"\xff" * 30
        if kind == "forged":
            other = query.replace(b"\6forged", b"\6other_")
            return _message(other, RESPONSE, [_address("127.0.0.1")])
        if needs_tcp and not over_tcp:
            return _message(query, TRUNCATED)
        if kind in ("servfail", "refused"):
            return _message(query, RESPONSE | (SERVFAIL if kind == "servfail" else REFUSED))
        if kind == "loop":
            aliases = [_alias(b"\xc0\x0c", b"\1x\0"), _alias(b"\1x\0", b"\xc0\x0c")]
            return _message(query, RESPONSE, aliases)
        found = self.addresses.get(name)
        if found is None:
            return _message(query, RESPONSE | NXDOMAIN)
        number = {"many": 1000, "huge": 4000}.get(kind, 1)
        first = int(ip_address(found))
        records = [_address(str(ip_address(first + n))) for n in range(number)]
        return _message(query, RESPONSE, records if wants_ipv4 else [])


def _name(query: bytes) -> str:
    labels, position = [], 12
    while length := query[position]:
        labels.append(query[position + 1 : position + 1 + length].decode().lower())
        position += 1 + length
    return ".".join(labels)


def _question(query: bytes) -> bytes:
    return query[12 : query.index(b"\0", 12) + 5]


def _message(query: bytes, flags: int, records: list[bytes] | None = None) -> bytes:
    count = struct.pack(">5H", flags, 1, len(records or []), 0, 0)
    return query[:2] + count + _question(query) + b"".join(records or [])


def _address(text: str) -> bytes:
    return b"\xc0\x0c" + struct.pack(">2HIH", A, 1, 60, 4) + ip_address(text).packed


def _alias(name: bytes, target: bytes) -> bytes:
    return name + struct.pack(">2HIH", CNAME, 1, 60, len(target)) + target


@contextlib.contextmanager
def nameserver(**addresses: str) -> Iterator[Nameserver]:
    server = Nameserver(**addresses)
    threads = [
        threading.Thread(target=serve, daemon=True)
        for serve in (server.serve_udp, server.serve_tcp)
    ]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.stop()
        for thread in threads:
            thread.join(WAIT_S)

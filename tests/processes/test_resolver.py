"""Lookups with a real nameserver that answers for some names and not for others."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from ipaddress import ip_address
from typing import Any

import pytest
import uvloop

from server.errors import ImageFetchTimeout, ImageUrlBlocked, SaccadeError
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.guard import SystemLookup
from tests.hostile_origin import WAIT_S, HostileOrigin

Run = Callable[[Coroutine[Any, Any, Any]], Any]
HANGING = 64


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


class Nameserver:
    """Has the IPv4 addresses of some names, and never answers for those in `silent`.

    Attributes:
        asked: the names that it was asked about.
    """

    def __init__(self, **addresses: str) -> None:
        self.addresses = {name.replace("_", "."): text for name, text in addresses.items()}
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self._stopping = threading.Event()
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def serve(self) -> None:
        """Answer until `stop` is called."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                query, client = self._socket.recvfrom(4096)
                if reply := self._reply(query):
                    self._socket.sendto(reply, client)
        self._socket.close()

    def stop(self) -> None:
        self._stopping.set()

    def _reply(self, query: bytes) -> bytes | None:
        labels, position = [], 12
        if len(query) < position:  # c-ares also sends empty datagrams
            return None
        while length := query[position]:
            labels.append(query[position + 1 : position + 1 + length].decode().lower())
            position += 1 + length
        name, question = ".".join(labels), query[12 : position + 5]
        self.asked.append(name)
        if name.startswith("hanging"):
            return None
        address = self.addresses.get(name)
        is_known = address is not None and question[-4:-2] == b"\0\1"
        flags = 0x8180 if address is not None else 0x8183
        head = query[:2] + struct.pack(">5H", flags, 1, int(is_known), 0, 0)
        if not is_known:
            return head + question
        record = b"\xc0\x0c" + struct.pack(">2HIH", 1, 1, 60, 4) + ip_address(address).packed
        return head + question + record


@contextlib.contextmanager
def nameserver(**addresses: str) -> Iterator[Nameserver]:
    server = Nameserver(**addresses)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(WAIT_S)


@contextlib.asynccontextmanager
async def system_lookup(*nameservers: str) -> AsyncIterator[SystemLookup]:
    lookup = SystemLookup(nameservers or None)
    try:
        yield lookup
    finally:
        await lookup.close()


async def failure(fetcher: Fetcher, url: str) -> SaccadeError:
    with pytest.raises(SaccadeError) as caught:
        await fetcher.fetch(url, "")
    return caught.value


def test_names_resolve_to_their_addresses(run: Run) -> None:
    async def look_up() -> None:
        async with system_lookup(dns.address) as lookup:
            assert await lookup("images.test", 80) == [ip_address("127.0.0.1")]
            assert await lookup("my_service.test", 80) == [ip_address("127.0.0.2")]
            assert ip_address("127.0.0.1") in await lookup("localhost", 80)
            with pytest.raises(OSError, match="lookup failed"):
                await lookup("nowhere.test", 80)

    with nameserver(images_test="127.0.0.1") as dns:
        dns.addresses["my_service.test"] = "127.0.0.2"
        run(look_up())


def test_names_in_the_hosts_file_resolve(run: Run) -> None:
    async def look_up(name: str) -> None:
        async with system_lookup() as lookup:
            found = await lookup(name, 80)
        system = {ip_address(it[4][0]) for it in socket.getaddrinfo(name, 80)}
        assert system <= set(found)

    with open("/etc/hosts") as hosts:
        names = {line.split()[1] for line in hosts if line[:1].isdigit() and len(line.split()) > 1}
    for name in sorted(names):
        run(look_up(name))


def test_hanging_lookups_block_neither_other_lookups_nor_threads(run: Run) -> None:
    async def many() -> None:
        settings = FetchSettings(allow_private=True, timeout_s=3)
        async with (
            system_lookup(dns.address) as lookup,
            Fetcher(settings, lookup=lookup) as fetcher,
        ):
            assert await fetcher.fetch(origin.url("/ok", "images.test"), "")
            threads = threading.active_count()
            hanging = [
                asyncio.create_task(failure(fetcher, f"http://hanging{n}.test/"))
                for n in range(HANGING)
            ]
            while len({name for name in dns.asked if name.startswith("hanging")}) < HANGING:
                await asyncio.sleep(0.01)
            assert threading.active_count() <= threads
            assert await fetcher.fetch(origin.url("/ok?again", "other.test"), "")
            assert not any(task.done() for task in hanging)
            errors = await asyncio.gather(*hanging)
            assert {type(error) for error in errors} == {ImageFetchTimeout}

    with (
        HostileOrigin() as origin,
        nameserver(images_test="127.0.0.1", other_test="127.0.0.1") as dns,
    ):
        run(many())


def test_private_addresses_from_the_nameserver_are_refused(run: Run) -> None:
    async def fetch() -> SaccadeError:
        async with (
            system_lookup(dns.address) as lookup,
            Fetcher(FetchSettings(), lookup=lookup) as fetcher,
        ):
            return await failure(fetcher, origin.url("/ok", "images.test"))

    with HostileOrigin() as origin, nameserver(images_test="127.0.0.1") as dns:
        assert isinstance(run(fetch()), ImageUrlBlocked)
        assert origin.connections == 0

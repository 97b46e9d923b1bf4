"""Opens connections to the servers of images, wherever the guard lets them lead.

A name is looked up once for each connection, every address it has is judged by `ingest.guard`, and
exactly these addresses are dialled. So neither a redirect nor a name that changes its address
between the check and the connection (DNS rebinding) leads anywhere else.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from server.errors import ImageFetchFailed, ImageUrlBlocked
from server.ingest.connection import Connection
from server.ingest.guard import Address, Policy, address_of, allowed

Resolver = Callable[[str, int], Awaitable[list[Address]]]
"""(host, port) -> the addresses of the host. Raises OSError."""

MAX_ADDRESSES_DIALLED = 4
# RFC 8305 (happy eyeballs), section 5: how long to wait before the next address is tried too.
STAGGER_S = 0.25
# A lookup cannot be cancelled: it holds its thread until the system's resolver gives up.
LOOKUP_THREADS = 32


class SystemResolver:
    """Looks names up as the system does, in threads of its own.

    The loop's threads are few (uvloop has four), and names that do not answer would hold them.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, "image-lookup")

    async def __call__(self, host: str, port: int) -> list[Address]:
        # As bytes: `getaddrinfo` would encode a string once more, by another standard.
        name = host.encode("ascii")
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        )
        return [ipaddress.ip_address(address[0]) for *_, address in found]

    def close(self) -> None:
        """Drop the lookups that have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Dialler:
    """Opens connections to hosts that a policy allows, and to no others."""

    def __init__(self, policy: Policy, resolve: Resolver) -> None:
        self._policy = policy
        self._resolve = resolve

    async def connect(self, host: str, port: int, tls: ssl.SSLContext | None) -> Connection:
        """A connection to `host`; with `tls`, one with the certificate of `host`.

        Raises:
            ImageUrlBlocked: the policy refuses an address of `host`. One is enough, or else
                chance would decide whether a name with several can be fetched from.
            ImageFetchFailed: `host` has no address.
            OSError: none of the addresses could be connected to.
        """
        server_hostname = host.removesuffix(".") if tls else None
        loop = asyncio.get_running_loop()

        async def dial(address: Address) -> Connection:
            _, connection = await loop.create_connection(
                Connection, str(address), port, ssl=tls, server_hostname=server_hostname
            )
            return connection

        return await _first(dial, await self._addresses(host, port))

    async def _addresses(self, host: str, port: int) -> list[Address]:
        literal = address_of(host)
        try:
            found = [literal] if literal is not None else await self._resolve(host, port)
        except OSError:
            found = []
        if not all(allowed(address, self._policy, host) for address in found):
            raise ImageUrlBlocked("the host of the image URL is not allowed")
        if not found:
            raise ImageFetchFailed("the host of the image URL could not be found")
        return _by_turns(found)[:MAX_ADDRESSES_DIALLED]


def _by_turns(addresses: list[Address]) -> list[Address]:
    """Each address once, in order, but IPv4 and IPv6 by turns."""
    version = addresses[0].version
    first = dict.fromkeys(address for address in addresses if address.version == version)
    other = dict.fromkeys(address for address in addresses if address.version != version)
    return [address for pair in zip_longest(first, other) for address in pair if address]


async def _first(
    dial: Callable[[Address], Coroutine[Any, Any, Connection]], addresses: list[Address]
) -> Connection:
    """The first connection that stands; an address that is slow does not hold up the next."""
    left = deque(addresses)
    attempts: list[asyncio.Task[Connection]] = []
    winner: asyncio.Task[Connection] | None = None
    try:
        while winner is None:
            if left:
                attempts.append(asyncio.create_task(dial(left.popleft())))
            pending = [attempt for attempt in attempts if not attempt.done()]
            if not pending:
                break
            await asyncio.wait(
                pending,
                timeout=STAGGER_S if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            winner = next(filter(_stands, attempts), None)
        return (winner or attempts[0]).result()
    finally:
        for attempt in attempts:
            if attempt is not winner:
                attempt.cancel()
                attempt.add_done_callback(_discard)


def _stands(attempt: asyncio.Task[Connection]) -> bool:
    return attempt.done() and not attempt.cancelled() and attempt.exception() is None


def _discard(attempt: asyncio.Task[Connection]) -> None:
    if _stands(attempt):
        attempt.result().close()

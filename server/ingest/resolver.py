"""Looks up the servers of images, and lets no address through that the guard refuses.

aiohttp dials exactly the addresses that its resolver returns, and asks for each connection anew. So
neither a redirect nor a name that changes its address between the check and the connection (DNS
rebinding) leads anywhere else.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from itertools import zip_longest

import aiodns
from aiohttp.abc import AbstractResolver, ResolveResult

from server.errors import ImageFetchFailed, ImageUrlBlocked
from server.ingest.guard import Address, Policy, address_of, allowed

Lookup = Callable[[str, int], Awaitable[list[Address]]]
"""(host, port) -> the addresses of the host. Raises OSError."""

MAX_ADDRESSES_DIALLED = 4
# c-ares repeats a query after 0.25 s or more, by how fast the nameserver was lately, and doubles
# the wait each time. With fewer tries a slow name would fail long before its fetch's deadline.
LOOKUP_TRIES = 7


class SystemLookup:
    """Looks names up in /etc/hosts and with the nameservers of /etc/resolv.conf, by c-ares.

    A name whose nameserver hangs costs one query, which is dropped when its fetch is cancelled; the
    system's own resolver would hold a thread until it gives up. As every nameserver does, c-ares
    keeps an answer for its time to live, for all groups of API keys alike.
    """

    def __init__(self, nameservers: Sequence[str] | None = None) -> None:
        """`nameservers` are asked instead of the system's, each as ADDRESS:PORT."""
        self._nameservers = nameservers
        self._resolver: aiodns.DNSResolver | None = None

    async def __call__(self, host: str, port: int) -> list[Address]:
        if self._resolver is None:  # it belongs to the running loop
            self._resolver = aiodns.DNSResolver(self._nameservers, tries=LOOKUP_TRIES)
        try:
            found = await self._resolver.getaddrinfo(
                host, family=socket.AF_UNSPEC, port=port, type=socket.SOCK_STREAM
            )
        except aiodns.error.DNSError as error:
            raise OSError(f"the lookup failed: {error}") from error
        return [ipaddress.ip_address(node.addr[0].decode("ascii")) for node in found.nodes]

    async def close(self) -> None:
        """Drop the lookups that have not ended."""
        if self._resolver is not None:
            await self._resolver.close()
            self._resolver = None


class GuardedResolver(AbstractResolver):
    """Resolves names for aiohttp to addresses that `policy` allows, and to no others."""

    def __init__(self, policy: Policy, lookup: Lookup) -> None:
        self._policy = policy
        self._lookup = lookup

    def check_literal(self, host: str) -> None:
        """Judge `host` if it is an address: aiohttp asks no resolver about those.

        Raises:
            ImageUrlBlocked: the policy refuses it.
        """
        address = address_of(host)
        if address is not None:
            self._judge([address], host)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """At most MAX_ADDRESSES_DIALLED addresses of `host`.

        Raises:
            ImageUrlBlocked: the policy refuses an address of `host`. One is enough, or else
                chance would decide whether a name with several can be fetched from.
            ImageFetchFailed: `host` has no address.
        """
        try:
            found = await self._lookup(host, port)
        except OSError:
            found = []
        self._judge(found, host)
        if not found:
            raise ImageFetchFailed("the host of the image URL could not be found")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in _alternated(found)[:MAX_ADDRESSES_DIALLED]
        ]

    async def close(self) -> None:
        """There is nothing to close: whoever made the lookup closes it."""

    def _judge(self, addresses: list[Address], host: str) -> None:
        if not all(allowed(address, self._policy, host) for address in addresses):
            raise ImageUrlBlocked("the host of the image URL is not allowed")


def _alternated(addresses: list[Address]) -> list[Address]:
    """Each address once, in order, but IPv4 and IPv6 alternately."""
    version = addresses[0].version
    first = dict.fromkeys(address for address in addresses if address.version == version)
    other = dict.fromkeys(address for address in addresses if address.version != version)
    return [address for pair in zip_longest(first, other) for address in pair if address]

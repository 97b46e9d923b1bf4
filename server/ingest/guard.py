"""Decides which hosts and addresses images are fetched from, and resolves names to these only.

aiohttp dials exactly the addresses that its resolver returns, and resolves the host again for each
connection. So neither a redirect nor a name that changes its address between the check and the
connection (DNS rebinding) leads anywhere else.
"""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import zip_longest
from typing import Self

import aiodns
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult

from server.errors import ImageFetchFailed, ImageUrlBlocked, InvalidImageUrl

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[[str, int], Awaitable[list[Address]]]
"""(host, port) -> the addresses of the host. Raises OSError."""


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(network) for network in text.split())


# Tables of our own, because `is_global` of `ipaddress` differs between versions of Python.
# Networks with an operator's own servers: private, shared (CGNAT), loopback, unique local.
_PRIVATE = _networks(
    "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 127.0.0.0/8 ::1/128 fc00::/7"
)
# Never fetched from: IANA's special-purpose registries, and the metadata services of clouds.
_CLOSED = _networks(
    "0.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 "
    "198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    # Protocol assignments with Teredo, documentation, 6to4, documentation.
    "2001::/23 2001:db8::/32 2002::/16 3fff::/20 "
    # Metadata services that are elsewhere than 169.254.0.0/16: Alibaba, Azure, AWS, Google.
    "100.100.100.200/32 168.63.129.16/32 fd00:ec2::/32 fd20:ce::254/128"
)
# RFC 4291, section 2.4: the only IPv6 addresses that are assigned to the Internet.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# RFC 4291, section 2.5.5.2 (IPv4-mapped), RFC 6052 (NAT64): the last 32 bits are the address.
_EMBEDDING_IPV4 = _networks("::ffff:0:0/96 64:ff9b::/96")

MAX_ADDRESSES_DIALLED = 4
# A nameserver may send thousands, and each that is read is checked on the event loop.
MAX_ADDRESSES_READ = 64
# c-ares repeats a query after 0.25 s or more, by how fast the nameserver was lately, and doubles
# the wait each time. With fewer tries a slow name would fail long before its fetch's deadline.
LOOKUP_TRIES = 7
# c-ares goes on with a lookup whose fetch was cancelled. It can only drop all lookups of a channel.
MAX_ABANDONED_LOOKUPS = 64

_NAME = re.compile(r"(?=.{1,254}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
# A host that ends in a number is an IPv4 address in some notation: 127.1, 0x7f000001.
_NUMBER_LAST = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?")


@dataclass(frozen=True)
class Policy:
    """Which hosts and addresses may be fetched from; by default, the public Internet.

    Attributes:
        allow_private: allow private addresses too. Link-local addresses and the metadata services
            of clouds are not among them.
        networks: allow all addresses in these networks.
        hosts: allow private addresses of these names: exact, or `*.example.com` for every name
            below example.com.
        only_hosts: if not empty, refuse all other hosts. This allows no additional addresses.
    """

    allow_private: bool = False
    networks: tuple[Network, ...] = ()
    hosts: tuple[str, ...] = ()
    only_hosts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        allow_private: bool = False,
        allowed: Iterable[str] = (),
        only_hosts: Iterable[str] = (),
    ) -> Self:
        """The policy for these settings; entries of `allowed` are networks, addresses or hosts.

        Raises:
            ValueError: an entry is invalid; the message names it.
        """
        entries = [_entry(text) for text in allowed]
        return cls(
            allow_private,
            tuple(entry for entry in entries if not isinstance(entry, str)),
            tuple(entry for entry in entries if isinstance(entry, str)),
            tuple(_host_entry(text) for text in only_hosts),
        )


def _entry(text: str) -> Network | str:
    if "/" not in text and address_of(text) is None:
        return _host_entry(text)
    try:
        return ipaddress.ip_network(text.strip("[]"))
    except ValueError as error:
        raise ValueError(f"not a network: {error}") from None


def _host_entry(text: str) -> str:
    below, name = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    try:
        host = canonical(httpx.URL(scheme="http", host=name).raw_host.decode("ascii"))
    except (httpx.InvalidURL, ValueError):
        host = ""
    if not _is_plain(host):
        raise ValueError(f"neither a host nor an address: {text!r}")
    return below + host


def address_of(host: str) -> Address | None:
    """`host` as an address; None if it is a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def canonical(host: str) -> str:
    """`host` in the form for comparisons: lower case, no trailing dot, no brackets, short IPv6."""
    address = address_of(host)
    return str(address) if address is not None else host.lower().removesuffix(".")


def allowed(address: Address, policy: Policy, host: str = "") -> bool:
    """Whether `policy` allows a fetch of `host`, a name or an address, from `address`."""
    if any(address in network for network in policy.networks):
        return True
    if any(address in network for network in _EMBEDDING_IPV4):
        return allowed(IPv4Address(int(address) & 0xFFFFFFFF), policy, host)
    if any(address in network for network in _CLOSED):
        return False
    if any(address in network for network in _PRIVATE):
        return policy.allow_private or _is_among(host, policy.hosts)
    return address.version == 4 or address in _GLOBAL_UNICAST


def check_host(host: str, policy: Policy) -> None:
    """Raises ImageUrlBlocked if `policy` has a list of hosts and `host` is not on it."""
    if policy.only_hosts and not _is_among(host, policy.only_hosts):
        raise ImageUrlBlocked("the host of the image URL is not among the allowed domains")


def _is_among(host: str, patterns: tuple[str, ...]) -> bool:
    host = canonical(host)
    return any(
        host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )


def check_url(url: str) -> httpx.URL:
    """Parse `url`. Its `raw_host` is then a plain name or a plain IP address.

    Raises:
        InvalidImageUrl: the URL is not http or https, has no host, has a user, or has a host in a
            notation that programs interpret differently.
    """
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, ValueError):
        raise InvalidImageUrl("the image URL is not a valid URL") from None
    if parsed.scheme not in ("http", "https"):
        raise InvalidImageUrl("the image URL must be a data, http or https URL")
    authority = re.split(r"[/?#]", url.partition("//")[2], maxsplit=1)[0]
    if "@" in authority:
        raise InvalidImageUrl("the image URL must not contain a user")
    if not host:
        raise InvalidImageUrl("the image URL has no host")
    # Names may be in any script, with variants of the dot; addresses must not use these variants.
    if not _is_plain(host) or (address_of(host) is not None and not authority.isascii()):
        raise InvalidImageUrl("the host of the image URL is neither a plain name nor an IP address")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise InvalidImageUrl("the port of the image URL is not between 1 and 65535")
    return parsed


def _is_plain(host: str) -> bool:
    if ":" in host:
        return "%" not in host  # no zone; the parser accepts only IPv6 addresses here
    if _NUMBER_LAST.fullmatch(host):
        return address_of(host) is not None
    return _NAME.fullmatch(host) is not None


# ---------------------------------------------------------------------- resolving


@dataclass(eq=False)
class _Channel:
    """A channel of c-ares, with the numbers of lookups that someone waits for, and that someone has
    cancelled before their end."""

    resolver: aiodns.DNSResolver
    waiting: int = 0
    abandoned: int = 0


class SystemLookup:
    """Looks names up in /etc/hosts and with the nameservers of /etc/resolv.conf, by c-ares.

    A nameserver that hangs costs one query, which is cancelled with its fetch; the system's own
    resolver would occupy a thread until it gave up. Like every nameserver, c-ares keeps an answer
    for its time to live. All groups of API keys share these answers.

    A channel with many abandoned lookups, or with nothing but those, is closed once nobody waits
    for it, so that queries do not pile up.
    """

    def __init__(self, nameservers: Sequence[str] | None = None) -> None:
        """`nameservers`, each as ADDRESS:PORT, replace those of the system."""
        self._nameservers = nameservers
        self._channels: list[_Channel] = []  # new lookups use the last one

    async def __call__(self, host: str, port: int) -> list[Address]:
        """At most MAX_ADDRESSES_READ addresses of `host`."""
        channel = self._current()
        channel.waiting += 1
        lookup = channel.resolver.getaddrinfo(
            host, family=socket.AF_UNSPEC, port=port, type=socket.SOCK_STREAM
        )
        try:
            found = await lookup
        except aiodns.error.DNSError as error:
            raise OSError(f"the lookup failed: {error}") from error
        finally:
            channel.waiting -= 1
            channel.abandoned += lookup.cancelled()
            await self._drop_abandoned(channel)
        nodes = found.nodes[:MAX_ADDRESSES_READ]
        return [ipaddress.ip_address(node.addr[0].decode("ascii")) for node in nodes]

    def _current(self) -> _Channel:
        """The channel for a new lookup."""
        if not self._channels or self._channels[-1].abandoned >= MAX_ABANDONED_LOOKUPS:
            resolver = aiodns.DNSResolver(self._nameservers, tries=LOOKUP_TRIES)
            self._channels.append(_Channel(resolver))
        return self._channels[-1]

    async def _drop_abandoned(self, channel: _Channel) -> None:
        if channel.abandoned and not channel.waiting and channel in self._channels:
            self._channels.remove(channel)
            await channel.resolver.close()

    async def close(self) -> None:
        """Cancel pending lookups."""
        while self._channels:
            await self._channels.pop().resolver.close()


class GuardedResolver(AbstractResolver):
    """Resolves names for aiohttp to addresses that `policy` allows, and to no others."""

    def __init__(self, policy: Policy, lookup: Lookup) -> None:
        self._policy = policy
        self._lookup = lookup

    def check_literal(self, host: str) -> None:
        """Check `host` if it is an address: aiohttp does not pass those to the resolver.

        Raises:
            ImageUrlBlocked: the policy refuses it.
        """
        address = address_of(host)
        if address is not None:
            self._check([address], host)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """At most MAX_ADDRESSES_DIALLED addresses of `host`.

        Raises:
            ImageUrlBlocked: the policy refuses an address of `host`. One is enough: otherwise,
                chance would decide whether a name with several addresses works.
            ImageFetchFailed: `host` has no address.
        """
        try:
            found = await self._lookup(host, port)
        except OSError:
            found = []
        self._check(found, host)
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
        """Nothing to close: the owner of the lookup closes it."""

    def _check(self, addresses: list[Address], host: str) -> None:
        if not all(allowed(address, self._policy, host) for address in addresses):
            raise ImageUrlBlocked("the host of the image URL is not allowed")


def _alternated(addresses: list[Address]) -> list[Address]:
    """The distinct addresses in order, alternating between IPv4 and IPv6."""
    version = addresses[0].version
    first = dict.fromkeys(address for address in addresses if address.version == version)
    other = dict.fromkeys(address for address in addresses if address.version != version)
    return [address for pair in zip_longest(first, other) for address in pair if address]

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


# Tables of our own, since what `ipaddress` calls global differs between versions of Python.
# Where an operator's own servers are: private, shared (CGNAT), loopback, unique local.
_PRIVATE = _networks(
    "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 127.0.0.0/8 ::1/128 fc00::/7"
)
# Where no image is: IANA's special-purpose registries, and where clouds tell machines secrets.
_CLOSED = _networks(
    "0.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 "
    "198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    # Protocol assignments with Teredo, documentation, 6to4, documentation.
    "2001::/23 2001:db8::/32 2002::/16 3fff::/20 "
    # Metadata services that are elsewhere than 169.254.0.0/16: Alibaba, Azure, AWS, Google.
    "100.100.100.200/32 168.63.129.16/32 fd00:ec2::/32 fd20:ce::254/128"
)
# RFC 4291, section 2.4: of IPv6, nothing else is assigned to the Internet.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# RFC 4291, section 2.5.5.2 (IPv4-mapped), and RFC 6052 (NAT64): the last 32 bits are dialled.
_EMBEDDING_IPV4 = _networks("::ffff:0:0/96 64:ff9b::/96")

MAX_ADDRESSES_DIALLED = 4
# c-ares repeats a query after 0.25 s or more, by how fast the nameserver was lately, and doubles
# the wait each time. With fewer tries a slow name would fail long before its fetch's deadline.
LOOKUP_TRIES = 7

_NAME = re.compile(r"(?=.{1,254}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
# A host that ends in a number is an IPv4 address in some notation: 127.1, 0x7f000001.
_NUMBER_LAST = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?")


@dataclass(frozen=True)
class Policy:
    """Which hosts and addresses may be fetched from; as it stands, the public Internet.

    Attributes:
        allow_private: private addresses may be fetched from as well. Link-local addresses and the
            metadata services of clouds are not among them.
        networks: whatever address these contain may be fetched from.
        hosts: names whose private addresses may be fetched from: exact, or `*.example.com` for
            every name below example.com.
        only_hosts: no other hosts are fetched from, if there are any. They open no address.
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
        """The policy that settings describe; `allowed` has networks, addresses and hosts.

        Raises:
            ValueError: an entry is none of these; the message names it.
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
    """The address that `host` is, or None if it is a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def canonical(host: str) -> str:
    """`host` as it is compared: lower case, no trailing dot, no brackets, IPv6 shortened."""
    address = address_of(host)
    return str(address) if address is not None else host.lower().removesuffix(".")


def allowed(address: Address, policy: Policy, host: str = "") -> bool:
    """Whether `policy` lets `host`, a name or an address, be fetched from `address`."""
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
        InvalidImageUrl: it is not http or https, names no host or a user, or writes the host in
            one of the notations that programs read differently.
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
        raise InvalidImageUrl("the image URL must not name a user")
    if not host:
        raise InvalidImageUrl("the image URL has no host")
    # Names may be in any script; their dots then have variants, which addresses must not use.
    if not _is_plain(host) or (address_of(host) is not None and not authority.isascii()):
        raise InvalidImageUrl("the host of the image URL is neither a plain name nor an IP address")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise InvalidImageUrl("the port of the image URL is not between 1 and 65535")
    return parsed


def _is_plain(host: str) -> bool:
    if ":" in host:
        return "%" not in host  # no zone; the parser takes nothing but IPv6 addresses here
    if _NUMBER_LAST.fullmatch(host):
        return address_of(host) is not None
    return _NAME.fullmatch(host) is not None


# ---------------------------------------------------------------------- resolving


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

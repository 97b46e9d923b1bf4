"""The addresses, hosts and URLs that the guard allows."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from server.errors import ImageUrlBlocked, InvalidImageUrl
from server.ingest.guard import Policy, allowed, canonical, check_host, check_url

INTERNET = Policy()
PRIVATE_TOO = Policy(allow_private=True)

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2a00:1450:4001:81b::200e",
    "2001:4860:4860::8888",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]
PRIVATE = [
    "10.0.0.0",
    "10.255.255.255",
    "100.64.0.0",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.255",
    "172.16.0.0",
    "172.31.255.255",
    "192.168.0.0",
    "192.168.255.255",
    "::1",
    "fc00::1",
    "fd12:3456::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::192.168.0.1",
]
CLOSED = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "169.254.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "100.100.100.200",
    "168.63.129.16",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "2001:db8::1",
    "3fff::1",
    "2001::1",  # Teredo
    "2001:2::1",
    "2001:20::1",
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2002:808:808::",  # and of 8.8.8.8
    "64:ff9b:1::8.8.8.8",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:0:127.0.0.1",
    "100::1",
    "5f00::1",
    "4000::1",
    "::ffff:169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b::0.0.0.0",
]


def may(policy: Policy, address: str, host: str = "") -> bool:
    return allowed(ipaddress.ip_address(address), policy, host)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert may(INTERNET, address)
    assert may(PRIVATE_TOO, address)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_allowed_by_settings(address: str) -> None:
    assert not may(INTERNET, address)
    assert may(PRIVATE_TOO, address)
    trusting = Policy.of(allowed=["images.internal"])
    assert may(trusting, address, "images.internal")
    assert not may(trusting, address, "elsewhere.internal")


@pytest.mark.parametrize("address", CLOSED)
def test_special_addresses_are_allowed_only_by_their_network(address: str) -> None:
    assert not may(INTERNET, address)
    assert not may(PRIVATE_TOO, address)
    assert not may(Policy.of(allowed=["images.internal"]), address, "images.internal")
    assert may(Policy.of(allowed=["0.0.0.0/0", "::/0"]), address)


@given(st.ip_addresses(v=4))
def test_ipv4_addresses_that_python_calls_private_are_refused(
    address: ipaddress.IPv4Address,
) -> None:
    if address.is_private or address.is_multicast or address.is_reserved:
        assert not allowed(address, INTERNET)


@given(st.ip_addresses(v=6))
def test_ipv6_addresses_that_python_calls_private_are_refused(
    address: ipaddress.IPv6Address,
) -> None:
    if address.is_private or address.is_multicast or address.is_reserved:
        embedded = address.ipv4_mapped or address in ipaddress.ip_network("64:ff9b::/96")
        assert embedded or not allowed(address, INTERNET)


def test_a_network_allows_the_addresses_it_contains() -> None:
    policy = Policy.of(allowed=["10.1.0.0/16", "fd00::/8", "192.168.1.1"])
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "192.168.1.1"):
        assert may(policy, address)
    for address in ("10.2.0.0", "192.168.1.2", "127.0.0.1", "fe80::1"):
        assert not may(policy, address)


@pytest.mark.parametrize(
    ("host", "is_on_the_list"),
    [
        ("example.com", True),
        ("EXAMPLE.com.", True),
        ("a.images.example", True),
        ("a.b.images.example", True),
        ("images.example", False),
        ("evilimages.example", False),
        ("sub.example.com", False),
        ("example.com.evil.test", False),
        ("xn--mnchen-3ya.example", True),
        ("192.0.2.7", True),
        ("192.0.2.70", False),
        ("2001:DB8:0::7", True),
    ],
)
def test_a_list_of_hosts_allows_only_its_hosts(host: str, is_on_the_list: bool) -> None:
    hosts = ["Example.com", "*.images.example.", "münchen.example", "192.0.2.7", "[2001:db8::7]"]
    assert may(Policy.of(allowed=hosts), "10.0.0.1", host) == (
        is_on_the_list and not host[0].isdigit()
    )
    only = Policy.of(only_hosts=hosts)
    if is_on_the_list:
        check_host(host, only)
    else:
        with pytest.raises(ImageUrlBlocked):
            check_host(host, only)
    assert not may(only, "10.0.0.1", host)  # such a list allows no additional addresses


def test_hosts_are_refused_only_if_there_is_a_list_of_hosts() -> None:
    check_host("anywhere.example", Policy.of(allowed=["images.internal"]))
    with pytest.raises(ImageUrlBlocked):
        check_host("anywhere.example", Policy.of(only_hosts=["images.internal"]))


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.",
        "*.*.example",
        "10.0.0.1/8",
        "10.0.0.0/99",
        "127.1",
        "http://a.example",
        "a.example/x",
        "a.example:80",
        "a..example",
        "a b",
        "user@a.example",
    ],
)
def test_invalid_entries_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="not a network|neither a host") as caught:
        Policy.of(allowed=[entry])
    assert entry.strip() in str(caught.value)


def test_networks_are_refused_in_a_list_of_hosts() -> None:
    with pytest.raises(ValueError, match="neither a host"):
        Policy.of(only_hosts=["10.0.0.0/8"])


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("http://example.com", "example.com", "/"),
        (
            "HTTPS://EXAMPLE.com:8443/a%2Fb/./c?d=%2f&e=é#f",
            "example.com",
            "/a%2Fb/c?d=%2f&e=%C3%A9",
        ),
        ("http://münchen.de/ä", "xn--mnchen-3ya.de", "/%C3%A4"),
        ("http://my_service:80/", "my_service", "/"),
        ("http://localhost./", "localhost.", "/"),
        ("http://93.184.215.14/", "93.184.215.14", "/"),
        ("http://[::ffff:127.0.0.1]:80/", "::ffff:127.0.0.1", "/"),
        ("http://example.com/a@b:c", "example.com", "/a@b:c"),
        ("http://example.com?a@b", "example.com", "/?a@b"),
    ],
)
def test_plain_urls_are_accepted(url: str, host: str, path: str) -> None:
    parsed = check_url(url)
    assert parsed.raw_host.decode() == host
    assert parsed.raw_path.decode() == path


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com/",
        "ftp://example.com/",
        "gopher://example.com/",
        "javascript:alert(1)",
        "http:",
        "http://",
        "http:///path",
        "http:/example.com",
        "http://:80/",
        "http://?",
    ]
    + [f"http://{user}@127.0.0.1/" for user in ("good", "good:secret", "", "good@good")]
    + ["http://127.0.0.1:80\\@good/", "http://good\\@127.0.0.1/", "http://good\\.evil/"]
    + [f"http://{host}/" for host in ("0177.0.0.1", "0x7f.1", "2130706433", "127.1", "0x7f000001")]
    + [f"http://{host}/" for host in ("127.0.0.1.", "127.0.0.01", "1.2.3.4.5", "256.1.1.1", "0")]
    + [f"http://{host}/" for host in ("①②⑦.⓪.⓪.①", "１２７.0.0.1", "127。0。0。1", "ⓛocalhost")]
    + [f"http://{host}/" for host in ("%31%32%37.0.0.1", "a%00b", "a%2eb", "a b", "a\tb", "a\nb")]
    + [f"http://{host}/" for host in ("[::1", "::1", "[127.0.0.1]", "[fe80::1%25eth0]", "[::1%1]")]
    + [f"http://{host}/" for host in ("a..b", ".a", "a" * 64, "a." * 127 + "ab", "a,b", "a;b", "*")]
    + [f"http://example.com:{port}/" for port in ("0", "65536", "-1", "http", "80:80")]
    + ["http://example.com/\ud800", "http://example.com/" + "a" * 70_000],
)
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidImageUrl):
        check_url(url)


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="htps:/@\\.[]%0123456789abcxX-_?#①。é").map("http://".__add__),
        st.text().map("http://example.com/".__add__),
    )
)
def test_every_accepted_url_can_be_sent(url: str) -> None:
    try:
        parsed = check_url(url)
    except InvalidImageUrl:
        return
    assert parsed.scheme in ("http", "https")
    host = parsed.raw_host.decode("ascii")
    assert canonical(host)
    assert not set(host) & set("@\\/%?# ")
    sent = URL.build(
        scheme=parsed.scheme,
        authority=parsed.netloc.decode("ascii"),
        path=parsed.raw_path.decode("ascii"),
        encoded=True,
    )
    assert (sent.raw_host, sent.raw_path_qs) == (host, parsed.raw_path.decode("ascii"))
    assert not set(sent.raw_path_qs) & set(" \r\n\0")

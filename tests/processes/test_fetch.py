"""Fetching from a real web server that behaves badly."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from aiohttp.client_proto import ResponseHandler

from server import __version__
from server.errors import (
    ImageFetchFailed,
    ImageFetchTimeout,
    ImageTooLarge,
    ImageUrlBlocked,
    InvalidImageUrl,
    SaccadeError,
    ServerBusy,
)
from server.ingest import http_client
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.guard import Address
from tests.hostile_origin import WAIT_S, HostileOrigin, Visit, bomb
from tests.scarce_files import no_free_files

MB = 1_000_000
GROUP = "customers"
UNTIL_TOLD = 600.0
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
# Loopback has many addresses; these tests treat some of them as public.
HOME, PUBLIC, PUBLIC_TOO = "127.0.0.1", "127.0.0.2", "127.0.0.3"

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(autouse=True)
def no_system_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each fetcher the 20 ms that it takes to parse the system's certificates."""
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on either event loop; fails if the loop reports an error."""

    def run_it(work: Coroutine[Any, Any, Any]) -> Any:
        complaints: list[dict[str, Any]] = []

        async def watched() -> Any:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, complaint: complaints.append(complaint))
            return await work

        result = request.param(watched())
        assert not complaints
        return result

    return run_it


@pytest.fixture
def origin() -> Iterator[HostileOrigin]:
    with HostileOrigin() as running:
        yield running


class Names:
    """A resolver that returns the next of its answers for each lookup of a name."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ip_address(text) for text in answer.split()]


async def fetch(fetcher: Fetcher, url: str, max_bytes: int | None = None) -> bytes:
    return await fetcher.fetch(url, GROUP, max_bytes)


async def one(url: str, names: Names | None = None, **settings: Any) -> bytes:
    async with Fetcher(FetchSettings(**{"allow_private": True, **settings}), lookup=names) as it:
        return await fetch(it, url)


async def failing(fetcher: Fetcher, url: str) -> SaccadeError:
    with pytest.raises(SaccadeError) as caught:
        await fetch(fetcher, url)
    return caught.value


def refusal(run: Run, url: str, names: Names | None = None, **settings: Any) -> SaccadeError:
    """The error that fetching `url` raises."""

    async def fail() -> SaccadeError:
        given = FetchSettings(**{"allow_private": True, **settings})
        async with Fetcher(given, lookup=names) as fetcher:
            return await failing(fetcher, url)

    error = run(fail())
    assert isinstance(error, SaccadeError)
    return error


# Bodies.


@pytest.mark.parametrize("size", [0, 1, 1000, 5 * MB])
@pytest.mark.parametrize(
    "path", ["/ok?size={}", "/chunked?size={}&piece=8192", "/compressed?size={}"]
)
def test_bodies_are_returned_complete(
    run: Run, origin: HostileOrigin, path: str, size: int
) -> None:
    size -= size % 8192 if "piece" in path else 0
    assert run(one(origin.url(path.format(size)))) == b"x" * size


def test_an_html_page_with_status_200_is_returned_as_the_body(
    run: Run, origin: HostileOrigin
) -> None:
    assert run(one(origin.url("/html"))) == b"<html>not here</html>"


def test_the_request_has_only_the_expected_headers(
    run: Run, origin: HostileOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    names = Names(images_test=[HOME])

    async def twice() -> bytes:
        async with Fetcher(FetchSettings(allow_private=True), lookup=names) as fetcher:
            await fetch(fetcher, origin.url("/sets-cookie", "images.test"))
            return await fetch(fetcher, origin.url("/sets-cookie?q=%2F", "images.test"))

    assert run(twice()).decode().split("\r\n") == [
        "GET /sets-cookie?q=%2F HTTP/1.1",
        f"Host: images.test:{origin.port}",
        f"User-Agent: saccade/{__version__}",
        "Accept: */*",
        "Accept-Encoding: identity",
        "",
        "",
    ]


def test_an_ipv6_address_is_fetched_from(run: Run) -> None:
    try:
        with HostileOrigin("::1") as origin:
            assert len(run(one(origin.url("/ok")))) == 1000
            assert f"Host: [::1]:{origin.port}" in origin.heads[0]
    except OSError:
        pytest.skip("this machine has no IPv6")


# Addresses.


@pytest.mark.parametrize("host", [HOME, "localhost", "[::ffff:127.0.0.1]", "[::1]"])
def test_private_addresses_are_refused(run: Run, origin: HostileOrigin, host: str) -> None:
    error = refusal(run, origin.url("/ok", host), allow_private=False)
    assert isinstance(error, ImageUrlBlocked)
    assert origin.connections == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"allow_private": True},
        {"allowed": ("images.test",)},
        {"allowed": ("*.test",)},
        {"allowed": ("127.0.0.0/8",)},
        {"allow_private": True, "only_hosts": ("images.test",)},
    ],
)
def test_allowed_hosts_are_fetched_from(
    run: Run, origin: HostileOrigin, settings: dict[str, Any]
) -> None:
    names = Names(images_test=[HOME])
    settings = {"allow_private": False, **settings}
    assert run(one(origin.url("/ok", "images.test"), names, **settings))


def test_the_error_for_a_private_address_does_not_show_it(run: Run) -> None:
    names = Names(secret_test=["10.1.2.3"])
    error = refusal(run, "http://secret.test/", names, allow_private=False)
    assert isinstance(error, ImageUrlBlocked)
    assert "10." not in error.message


def test_names_that_resolve_to_private_addresses_are_refused(
    run: Run, origin: HostileOrigin
) -> None:
    for answer in (HOME, "::1", "::ffff:127.0.0.1", "0.0.0.0", "::"):
        names = Names(**{"localhost.": [answer]})
        error = refusal(run, origin.url("/ok", "localhost."), names, allow_private=False)
        assert isinstance(error, ImageUrlBlocked)
    assert origin.connections == 0


def test_a_name_with_one_private_address_is_refused(run: Run, origin: HostileOrigin) -> None:
    with HostileOrigin(PUBLIC) as public:
        for answer in (f"{PUBLIC} {HOME}", f"{HOME} {PUBLIC}"):
            names = Names(images_test=[answer])
            url = public.url("/ok", "images.test")
            error = refusal(run, url, names, allow_private=False, allowed=(PUBLIC,))
            assert isinstance(error, ImageUrlBlocked)
        assert public.connections == origin.connections == 0


def same_port(host: str, origin: HostileOrigin) -> HostileOrigin:
    """Another origin on the same port of `host`, so that a name can resolve to either."""
    return HostileOrigin(host, port=origin.port)


def test_a_name_is_looked_up_once_and_the_checked_address_is_used(run: Run) -> None:
    with HostileOrigin(PUBLIC) as public, same_port(HOME, public) as private:
        names = Names(rebinding_test=[PUBLIC, HOME])
        url = public.url("/ok", "rebinding.test")
        run(one(url, names, allow_private=False, allowed=(PUBLIC,)))
        assert names.asked == ["rebinding.test"]
        assert (public.connections, private.connections) == (1, 0)


@pytest.mark.parametrize("path", ["/shorter-than-announced", "/reset"])
def test_a_name_that_changes_to_a_private_address_is_refused(run: Run, path: str) -> None:
    """Neither for the next fetch nor for a retry."""
    with HostileOrigin(PUBLIC) as public, same_port(HOME, public) as private:
        names = Names(rebinding_test=[PUBLIC, HOME])
        url = public.url(path, "rebinding.test")

        async def twice() -> SaccadeError:
            settings = FetchSettings(allowed=(PUBLIC,))
            async with Fetcher(settings, lookup=names) as fetcher:
                await failing(fetcher, url)
                return await failing(fetcher, url)

        assert isinstance(run(twice()), ImageUrlBlocked)
        assert (public.connections, private.connections) == (1, 0)


def test_a_name_that_does_not_exist_fails(run: Run) -> None:
    assert isinstance(refusal(run, "http://nowhere.test/", Names()), ImageFetchFailed)
    assert isinstance(refusal(run, "http://empty.test/", Names(empty_test=[""])), ImageFetchFailed)


def test_a_silent_address_does_not_delay_the_next_one(run: Run) -> None:
    with HostileOrigin(PUBLIC) as origin, deaf(HOME, origin.port):
        names = Names(images_test=[f"{HOME} {PUBLIC}"])
        assert run(one(origin.url("/ok", "images.test"), names))


def test_a_refusing_address_is_skipped(run: Run) -> None:
    with HostileOrigin(PUBLIC) as origin:
        names = Names(images_test=[f"{PUBLIC_TOO} {HOME} {PUBLIC}"])
        assert run(one(origin.url("/ok", "images.test"), names))
        assert origin.connections == 1


@contextlib.contextmanager
def deaf(host: str, port: int) -> Iterator[None]:
    """A port that neither accepts nor refuses connections because its backlog is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, port))
        yield


@pytest.mark.parametrize("url", ["ftp://{}/", "http://user@{}/", "http://0x7f.1/", "nonsense"])
def test_malformed_urls_are_refused(run: Run, url: str) -> None:
    assert isinstance(refusal(run, url.format("example.com")), InvalidImageUrl)


# Redirects.


def test_redirects_are_followed(run: Run, origin: HostileOrigin) -> None:
    assert run(one(origin.url("/redirect-onwards?times=3"))) == b"x" * 1000
    assert run(one(origin.url("/redirect?to=" + origin.url("/ok")))) == b"x" * 1000
    assert run(one(origin.url(f"/redirect?to=//{HOME}:{origin.port}/ok"))) == b"x" * 1000


@pytest.mark.parametrize("path", ["/redirect-onwards?times=4", "/redirect-loop"])
def test_too_many_redirects_fail(run: Run, origin: HostileOrigin, path: str) -> None:
    assert isinstance(refusal(run, origin.url(path)), ImageFetchFailed)
    assert len(origin.heads) == 4


@pytest.mark.parametrize("max_redirects", [0, 1])
def test_the_limit_of_redirects_is_a_setting(
    run: Run, origin: HostileOrigin, max_redirects: int
) -> None:
    url = origin.url("/redirect-onwards?times=1")
    if max_redirects:
        assert run(one(url, max_redirects=max_redirects))
    else:
        assert isinstance(refusal(run, url, max_redirects=0), ImageFetchFailed)


def test_redirects_to_private_addresses_are_refused(run: Run, origin: HostileOrigin) -> None:
    with HostileOrigin(PUBLIC) as public:
        for target in (
            origin.url("/ok"),
            origin.url("/ok", "localhost"),
            origin.url("/ok", "[::ffff:127.0.0.1]"),
            f"//{HOME}:{origin.port}/ok",
            "http://169.254.169.254/latest/meta-data/",
        ):
            url = public.url("/redirect?to=" + target)
            error = refusal(run, url, allow_private=False, allowed=(PUBLIC,))
            assert isinstance(error, ImageUrlBlocked)
        assert public.connections == 5
        assert origin.connections == 0


def test_redirects_outside_the_allowed_domains_are_refused(run: Run, origin: HostileOrigin) -> None:
    names = Names(images_test=[HOME], other_test=[HOME])
    url = origin.url("/redirect?to=" + origin.url("/ok", "other.test"), "images.test")
    assert isinstance(refusal(run, url, names, only_hosts=("images.test",)), ImageUrlBlocked)
    assert names.asked == ["images.test"]
    assert run(one(url, names, only_hosts=("*.test",)))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://{}/", "gopher://{}/", "data:,x"])
def test_redirects_to_other_schemes_are_refused(
    run: Run, origin: HostileOrigin, target: str
) -> None:
    url = origin.url("/redirect?to=" + target.format(HOME))
    assert isinstance(refusal(run, url), ImageUrlBlocked)


@pytest.mark.parametrize("target", ["http://user@{}/", "http://127.1/", "http://[::1", "http://"])
def test_redirects_to_malformed_urls_fail(run: Run, origin: HostileOrigin, target: str) -> None:
    url = origin.url("/redirect?to=" + target.format(HOME))
    assert isinstance(refusal(run, url), ImageFetchFailed)


def test_a_redirect_without_a_target_fails(run: Run, origin: HostileOrigin) -> None:
    assert "status 302" in refusal(run, origin.url("/redirect-nowhere")).message


# Failures.


@pytest.mark.parametrize("code", [204, 206, 304, 400, 404, 500, 503])
def test_other_statuses_fail_without_a_retry(run: Run, origin: HostileOrigin, code: int) -> None:
    error = refusal(run, origin.url(f"/status?code={code}"))
    assert isinstance(error, ImageFetchFailed)
    assert str(code) in error.message
    assert "secret" not in error.message
    assert len(origin.heads) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/shorter-than-announced",
        "/reset-in-body",
        "/two-lengths",
        "/huge-length",
        "/announces-too-much?size=99999999999999999999",
        "/garbage",
        "/many-headers",
        "/long-head",
        "/half-a-head",
        "/bad-chunks",
        "/reset-without-framing",
        "/interim-flood",
        "/interim-drip",
        "/endless-field",
        "/negative-length",
        "/two-framings",
        "/endless-chunk-extension",
        "/endless-chunk-size",
        "/endless-trailers",
        "/endless-trailer",
        "/crumbs",
        "/compressed?as=br",
        "/compressed?cut=5",
    ],
)
def test_malformed_responses_fail_without_a_retry(
    run: Run, origin: HostileOrigin, path: str
) -> None:
    assert isinstance(refusal(run, origin.url(path)), ImageFetchFailed)
    assert len(origin.heads) == 1
    origin.wait(lambda it: it.open == 0)


def test_a_silent_server_is_retried_once(run: Run, origin: HostileOrigin) -> None:
    origin.resets_first = 1
    assert run(one(origin.url("/ok")))
    assert origin.connections == 2


@pytest.mark.parametrize("path", ["/reset", "/ok"])
def test_a_silent_server_is_not_retried_twice(run: Run, origin: HostileOrigin, path: str) -> None:
    origin.resets_first = 2 if path == "/ok" else 0
    error = refusal(run, origin.url(path))
    assert isinstance(error, ImageFetchFailed)
    assert "could not be reached" in error.message
    assert origin.connections == 2


def test_a_closed_port_fails(run: Run) -> None:
    with HostileOrigin() as origin:
        url = origin.url("/ok")
    assert "could not be reached" in refusal(run, url).message


@pytest.mark.parametrize(
    "path", ["/drip", "/drip-head", "/silent", "/announces-too-much?size=1000", "/ok?delay=60"]
)
def test_one_deadline_covers_the_whole_fetch(run: Run, origin: HostileOrigin, path: str) -> None:
    error = refusal(run, origin.url(path), timeout_s=2)
    assert isinstance(error, ImageFetchTimeout)
    assert "2 s" in error.message
    assert len(origin.heads) == 1


def test_the_deadline_includes_the_lookup(run: Run) -> None:
    async def lookup() -> SaccadeError:
        async def never(host: str, port: int) -> list[Address]:
            await asyncio.sleep(60)
            return []

        async with Fetcher(FetchSettings(timeout_s=0.2), lookup=never) as fetcher:
            return await failing(fetcher, "http://images.test/")

    assert isinstance(run(lookup()), ImageFetchTimeout)


def test_the_connection_is_closed_after_the_deadline(run: Run, origin: HostileOrigin) -> None:
    async def after() -> None:
        async with Fetcher(FetchSettings(allow_private=True, timeout_s=1.5)) as fetcher:
            urls = [origin.url(path) for path in ("/drip", "/silent", "/drip?")]
            urls.append(origin.url("/ok").replace("http:", "https:"))  # in the handshake
            await asyncio.gather(*(failing(fetcher, url) for url in urls))
            await asyncio.to_thread(origin.wait, lambda it: (it.connections, it.open) == (4, 0))

    run(after())


# Limits of bytes.


@pytest.mark.parametrize(
    "path",
    [
        "/ok?size=1000001",
        "/announces-too-much?size=1000001",
        "/announces-too-much?size=9999999999999999999",
        "/chunked?size=1000200&piece=300",
        "/chunked?size=2000000&piece=2000000",
        "/endless",
        "/endless-without-framing",
        "/huge-chunk",
        "/gzip-bomb",
        "/compressed?size=1000001",
    ],
)
def test_bodies_over_the_limit_are_refused(run: Run, origin: HostileOrigin, path: str) -> None:
    assert isinstance(refusal(run, origin.url(path), max_bytes=MB), ImageTooLarge)


def test_each_fetch_has_its_own_limit(run: Run, origin: HostileOrigin) -> None:
    async def both() -> None:
        async with Fetcher(FetchSettings(allow_private=True, max_bytes=1000)) as fetcher:
            assert isinstance(await failing(fetcher, origin.url("/ok?size=1001")), ImageTooLarge)
            for size in (1001, 1000):
                assert len(await fetch(fetcher, origin.url(f"/ok?size={size}"), 1001)) == size

    run(both())


@pytest.mark.parametrize(
    ("path", "factor"),
    [
        ("/endless", 1.25),
        ("/endless-without-framing", 1.25),
        ("/huge-chunk", 1.25),
        ("/gzip-bomb", 2.5),
    ],
)
def test_memory_for_hostile_bodies_is_bounded(
    run: Run, origin: HostileOrigin, path: str, factor: float
) -> None:
    bomb()
    run(one(origin.url("/ok")))
    tracemalloc.start()
    try:
        assert isinstance(refusal(run, origin.url(path), max_bytes=8 * MB), ImageTooLarge)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MB * factor + 2 * MB


# Connections.


def test_connections_are_reused(run: Run, origin: HostileOrigin) -> None:
    async def several() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            for size in (1000, 0, 100_000, 5 * MB):
                await fetch(fetcher, origin.url(f"/ok?size={size}"))
            assert (origin.connections, origin.open) == (1, 1)

    run(several())
    origin.wait(lambda it: it.open == 0)


def test_data_after_a_body_is_not_taken_for_the_next_response(
    run: Run, origin: HostileOrigin
) -> None:
    async def three() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            for n in range(3):
                assert await fetch(fetcher, origin.url(f"/longer-than-announced?{n}")) == b"body"
                assert await fetch(fetcher, origin.url(f"/ok?{n}")) == b"x" * 1000

    run(three())


def test_unsolicited_data_is_not_taken_for_the_next_response(
    run: Run, origin: HostileOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "KEEP_ALIVE_S", UNTIL_TOLD)

    async def tells_more_later(visit: Visit) -> None:
        await visit.respond("200 OK", b"body")
        await asyncio.sleep(0.05)
        await visit.respond("200 OK", b"forged")

    async def both() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            assert await fetch(fetcher, origin.url("/tells-more-later")) == b"body"
            await asyncio.to_thread(origin.wait, lambda it: it.open == 0)
            assert await fetch(fetcher, origin.url("/ok")) == b"x" * 1000

    origin.routes["/tells-more-later"] = tells_more_later
    run(both())


@pytest.fixture
def parsed_heads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The status of every head that aiohttp parses."""
    parsed: list[int] = []
    feed_data = ResponseHandler.feed_data

    def counted(self: ResponseHandler, data: Any, size: int = 0) -> None:
        parsed.append(data[0].code)
        feed_data(self, data, size)

    monkeypatch.setattr(ResponseHandler, "feed_data", counted)
    return parsed


def test_pipelined_extra_responses_are_not_parsed(
    run: Run, origin: HostileOrigin, parsed_heads: list[int]
) -> None:
    """Parsing thousands of them would block the event loop."""
    assert run(one(origin.url("/responses-behind-a-response"))) == b"x" * 10_000
    assert parsed_heads == [200]
    origin.wait(lambda it: it.open == 0)


def test_a_flood_of_interim_responses_is_cut_early(
    run: Run, origin: HostileOrigin, parsed_heads: list[int]
) -> None:
    assert isinstance(refusal(run, origin.url("/interim-flood")), ImageFetchFailed)
    assert 8 < len(parsed_heads) < 500


def test_a_few_interim_responses_are_skipped(run: Run, origin: HostileOrigin) -> None:
    async def hints_first(visit: Visit) -> None:
        await visit.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 8)
        await visit.respond("200 OK", b"body")

    origin.routes["/hints"] = hints_first
    assert run(one(origin.url("/hints"))) == b"body"


def test_a_head_that_arrives_in_many_segments_is_read(run: Run, origin: HostileOrigin) -> None:
    async def slow_head(visit: Visit) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n":
            await visit.send(bytes([byte]))
            await asyncio.sleep(0.001)
        await visit.send(b"body")

    origin.routes["/slow-head"] = slow_head
    assert run(one(origin.url("/slow-head"))) == b"body"


def test_groups_share_no_connection(run: Run, origin: HostileOrigin) -> None:
    async def each() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            for n, group in enumerate(["one", "two", "one", "two", ""]):
                await fetcher.fetch(origin.url(f"/ok?{n}"), group)
            assert origin.connections == 3

    run(each())


def test_idle_connections_to_a_busy_host_are_limited(run: Run, origin: HostileOrigin) -> None:
    names = Names(first_test=[HOME], second_test=[HOME])

    async def both() -> None:
        async with Fetcher(
            FetchSettings(allow_private=True, max_connections=4), lookup=names
        ) as it:
            for host in ("first.test", "second.test"):
                urls = [origin.url(f"/ok?delay=0.2&n={n}", host) for n in range(4)]
                await asyncio.gather(*(fetch(it, url) for url in urls))
            await asyncio.to_thread(origin.wait, lambda it: it.open == 4)
            assert origin.connections == 8
            await fetch(it, origin.url("/ok", "second.test"))
            assert origin.connections == 8  # the remaining connections belong to the host used last

    run(both())


def test_broken_idle_connections_are_replaced(run: Run, origin: HostileOrigin) -> None:
    seen: set[asyncio.StreamWriter] = set()

    async def once_a_connection(visit: Visit) -> None:
        if visit.writer in seen:
            visit.reset()
            return
        seen.add(visit.writer)
        await visit.respond("200 OK", b"body")

    async def several() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            urls = [origin.url(f"/once?{n}") for n in range(3)]
            assert await asyncio.gather(*(fetch(fetcher, url) for url in urls)) == [b"body"] * 3
            assert origin.connections == 3  # all of them are kept, and all are broken
            assert await fetch(fetcher, origin.url("/once?4")) == b"body"

    origin.routes["/once"] = once_a_connection
    run(several())
    assert origin.connections == 4


def test_concurrent_fetches_from_one_host_are_limited(run: Run, origin: HostileOrigin) -> None:
    async def many() -> None:
        settings = FetchSettings(allow_private=True, max_connections_per_host=3)
        async with Fetcher(settings) as fetcher:
            urls = [origin.url(f"/ok?delay=0.05&n={n}") for n in range(12)]
            await asyncio.gather(*(fetch(fetcher, url) for url in urls))

    run(many())
    assert origin.busiest == origin.connections == 3


def test_concurrent_fetches_from_all_hosts_are_limited(run: Run, origin: HostileOrigin) -> None:
    names = Names(**{f"host{n}_test": [HOME] for n in range(12)})

    async def many() -> None:
        settings = FetchSettings(allow_private=True, max_connections=3)
        async with Fetcher(settings, lookup=names) as fetcher:
            urls = [origin.url("/ok?delay=0.05", f"host{n}.test") for n in range(12)]
            await asyncio.gather(*(fetch(fetcher, url) for url in urls))
            await asyncio.to_thread(origin.wait, lambda it: it.open == 3)  # the idle ones

    run(many())
    assert origin.busiest == 3


def test_the_deadline_includes_waiting_for_a_busy_host(run: Run, origin: HostileOrigin) -> None:
    async def both() -> None:
        settings = FetchSettings(allow_private=True, max_connections_per_host=1, timeout_s=0.5)
        async with Fetcher(settings) as fetcher:
            urls = [origin.url(f"/silent?{n}") for n in range(5)]
            errors = await asyncio.gather(*(failing(fetcher, url) for url in urls))
            assert all(isinstance(error, ImageFetchTimeout) for error in errors)

    run(both())
    # If waiting did not count, each would send its request in turn. The next one may just do so
    # when all deadlines expire.
    assert len(origin.heads) < 3


def test_a_busy_host_does_not_delay_other_hosts(run: Run, origin: HostileOrigin) -> None:
    names = Names(busy_test=[HOME], other_test=[HOME])
    settings = FetchSettings(
        allow_private=True, max_connections=2, max_connections_per_host=1, timeout_s=UNTIL_TOLD
    )

    async def both() -> None:
        async with Fetcher(settings, lookup=names) as fetcher:
            urls = [origin.url(f"/silent?{n}", "busy.test") for n in range(4)]
            slow = [asyncio.create_task(failing(fetcher, url)) for url in urls]
            await asyncio.to_thread(origin.wait, lambda it: it.busy == 1)
            async with asyncio.timeout(WAIT_S):
                assert await fetch(fetcher, origin.url("/ok", "other.test"))
        await asyncio.gather(*slow)

    run(both())
    assert sum("/silent" in head for head in origin.heads) == 1


def test_deadlines_and_cancellations_lose_no_slot(run: Run, origin: HostileOrigin) -> None:
    """Deadlines and cancellations may come at any moment."""
    moments = random.Random(0)

    async def leave(fetcher: Fetcher, n: int) -> None:
        path = moments.choice(["/ok", "/status?code=404", "/reset", "/redirect-onwards?times=2"])
        with contextlib.suppress(TimeoutError, SaccadeError):
            async with asyncio.timeout(moments.uniform(0, 0.02)):
                await fetch(fetcher, origin.url(f"{path}{'&' if '?' in path else '?'}n={n}"))

    async def many() -> None:
        settings = FetchSettings(allow_private=True, max_connections=4, max_connections_per_host=3)
        async with Fetcher(settings) as fetcher:
            for turn in range(40):
                await asyncio.gather(*(leave(fetcher, 24 * turn + n) for n in range(24)))
            urls = [origin.url(f"/ok?{n}") for n in range(6)]
            assert all(await asyncio.gather(*(fetch(fetcher, url) for url in urls)))
            await asyncio.to_thread(origin.wait, lambda it: it.open <= 4 and it.busy == 0)

    run(many())
    origin.wait(lambda it: it.open == 0)


# Sharing.


def test_concurrent_fetches_of_one_url_share_one_request(run: Run, origin: HostileOrigin) -> None:
    url = origin.url("/ok?delay=0.1")

    async def ten() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            bodies = await asyncio.gather(*(fetch(fetcher, url) for _ in range(10)))
            assert len(origin.heads) == 1
            assert {id(body) for body in bodies} == {id(bodies[0])}
            await fetch(fetcher, url)
            assert len(origin.heads) == 2

    run(ten())


def test_the_size_of_a_file_is_known_to_all_callers_before_it_is_read(
    run: Run, origin: HostileOrigin
) -> None:
    sizes: list[int] = []

    async def several() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            for path in ("/ok?size=5000", "/chunked?size=8192&piece=8192"):
                fetches = (fetcher.fetch(origin.url(path), GROUP, None, sizes.append) for _ in "ab")
                assert len(set(await asyncio.gather(*fetches))) == 1

    run(several())
    assert sizes == [5000, 5000]  # the other server does not say it


def test_each_waiter_gets_a_separate_error_object(run: Run, origin: HostileOrigin) -> None:
    async def ten() -> list[SaccadeError]:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            url = origin.url("/status?code=404")
            return list(await asyncio.gather(*(failing(fetcher, url) for _ in range(10))))

    errors = run(ten())
    assert len({id(error) for error in errors}) == 10
    assert len(origin.heads) == 1


def test_a_fetch_is_cancelled_with_its_last_waiter(run: Run, origin: HostileOrigin) -> None:
    async def leave() -> None:
        settings = FetchSettings(allow_private=True, timeout_s=UNTIL_TOLD)
        async with Fetcher(settings) as fetcher:
            url = origin.url("/drip")
            first, second = (asyncio.create_task(fetch(fetcher, url)) for _ in range(2))
            await asyncio.to_thread(origin.wait, lambda it: it.busy == 1)
            first.cancel()
            await asyncio.wait([first])
            await asyncio.sleep(0.2)
            assert (origin.busy, origin.open) == (1, 1)
            second.cancel()
            await asyncio.wait([second])
            await asyncio.to_thread(origin.wait, lambda it: it.open == 0)
            assert first.cancelled()
            assert second.cancelled()

    run(leave())
    assert len(origin.heads) == 1


def test_a_new_waiter_does_not_join_a_cancelled_fetch(run: Run, origin: HostileOrigin) -> None:
    url = origin.url("/ok?delay=0.2")

    async def leave() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:

            async def impatient() -> bytes:
                try:
                    return await fetch(fetcher, url)
                except asyncio.CancelledError:
                    return await fetch(fetcher, url)

            fetching = asyncio.create_task(impatient())
            await asyncio.to_thread(origin.wait, lambda it: it.busy == 1)
            fetching.cancel()
            assert len(await fetching) == 1000

    run(leave())
    assert len(origin.heads) == 2


def test_closing_the_fetcher_cancels_running_fetches(run: Run, origin: HostileOrigin) -> None:
    async def close() -> SaccadeError:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            waiting = asyncio.create_task(failing(fetcher, origin.url("/silent")))
            await asyncio.to_thread(origin.wait, lambda it: it.busy == 1)
        return await waiting

    assert isinstance(run(close()), ServerBusy)
    origin.wait(lambda it: it.open == 0)


# TLS.


@pytest.fixture
def secure_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[HostileOrigin, list[str]]]:
    """An origin with a certificate for images.test, and the server names that clients sent."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    names_in_it = "-subj /CN=images.test -addext subjectAltName=DNS:images.test"
    command = f"{make} {names_in_it} -keyout {key} -out {certificate}".split()
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    names: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    with HostileOrigin(tls=context) as running:
        yield running, names


def test_a_trusted_certificate_is_accepted(
    run: Run, secure_origin: tuple[HostileOrigin, list[str]]
) -> None:
    origin, called = secure_origin

    async def two() -> None:
        names = Names(images_test=[HOME], **{"images.test.": [HOME]})
        async with Fetcher(FetchSettings(allow_private=True), lookup=names) as fetcher:
            body = await fetch(fetcher, origin.url("/ok?size=3000000", "images.test"))
            assert len(body) == 3_000_000
            await fetch(fetcher, origin.url("/ok", "images.test"))
            assert origin.connections == 1
            await fetch(fetcher, origin.url("/ok", "images.test."))

    run(two())
    assert called == ["images.test", "images.test"]


@pytest.mark.parametrize("host", ["other.test", HOME])
def test_a_certificate_for_another_name_is_refused(
    run: Run, secure_origin: tuple[HostileOrigin, list[str]], host: str
) -> None:
    origin, _ = secure_origin
    error = refusal(run, origin.url("/ok", host), Names(other_test=[HOME]))
    assert isinstance(error, ImageFetchFailed)
    assert "secure" in error.message
    assert origin.heads == []


def test_an_untrusted_certificate_is_refused(
    run: Run,
    secure_origin: tuple[HostileOrigin, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin, _ = secure_origin
    monkeypatch.delenv("SSL_CERT_FILE")
    error = refusal(run, origin.url("/ok", "images.test"), Names(images_test=[HOME]))
    assert isinstance(error, ImageFetchFailed)
    assert origin.heads == []


@pytest.mark.parametrize("entry", [{"allowed": ("10.0.0.1/8",)}, {"only_hosts": ("a b",)}])
def test_invalid_settings_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="10|a b"):
        Fetcher(FetchSettings(**entry))


def test_a_fetch_without_a_free_file_can_be_retried(run: Run, origin: HostileOrigin) -> None:
    async def test() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            with no_free_files():
                assert (await failing(fetcher, origin.url("/ok?size=9"))).code == "server_busy"
            assert await fetch(fetcher, origin.url("/ok?size=9")) == b"x" * 9

    run(test())


class BrokenHandshake:
    """A server that does `answer` with each connection, instead of a TLS handshake."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server((HOME, 0))
        self.url = f"https://{HOME}:{self._listener.getsockname()[1]}/ok"

    def __enter__(self) -> "BrokenHandshake":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)  # the client's greeting
                    self._answer(connection)


def speaks_plain_http(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def sends_an_alert(connection: socket.socket) -> None:
    connection.sendall(bytes.fromhex("15 0303 0002 02 28"))


def closes(connection: socket.socket) -> None:
    pass


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def greets_without_end(connection: socket.socket) -> None:
    """Records of a handshake message of 16 MB."""
    connection.sendall(bytes.fromhex("16 0303 4000 02 ffffff") + bytes(16380))
    while True:
        connection.sendall(bytes.fromhex("16 0303 4000") + bytes(16384))


@pytest.mark.parametrize(
    "answer", [speaks_plain_http, sends_an_alert, closes, resets, greets_without_end]
)
def test_a_broken_handshake_fails(run: Run, answer: Callable[[socket.socket], None]) -> None:
    with BrokenHandshake(answer) as server:
        assert isinstance(refusal(run, server.url), ImageFetchFailed)


def test_an_expired_certificate_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    for end, is_valid in ((datetime.now(UTC) + timedelta(days=1), True), (LONG_AGO, False)):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("images.test", not_after=end).configure_cert(tls)
        with HostileOrigin(tls=tls) as origin:
            url, names = origin.url("/ok", "images.test"), Names(images_test=[HOME])
            if is_valid:
                assert run(one(url, names))
            else:
                assert isinstance(refusal(run, url, names), ImageFetchFailed)
                assert origin.heads == []

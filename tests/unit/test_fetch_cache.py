"""The cache of fetched images, against a real web server and a clock that the test sets."""

import asyncio
import gzip
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from server.errors import (
    ImageFetchFailed,
    ImageFetchTimeout,
    ImageTooLarge,
    ImageUrlBlocked,
    InvalidImageUrl,
    SaccadeError,
)
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.fetch_cache import ENTRY_BYTES, CacheStats, FetchCache
from server.ingest.freshness import HttpHeader, ResponseHead
from tests.fetch_cache_bench import GROUP, MIB, Bench
from tests.hostile_origin import HostileOrigin, Visit

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(autouse=True)
def no_system_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each fetcher the 20 ms that it takes to parse the system's certificates."""
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with HostileOrigin() as origin:
        yield Bench(origin)


async def failing(fetcher: Fetcher, url: str, max_bytes: int | None = None) -> SaccadeError:
    with pytest.raises(SaccadeError) as caught:
        await fetcher.fetch(url, GROUP, max_bytes)
    return caught.value


def counted(result: str) -> float:
    labels = {"result": result}
    return REGISTRY.get_sample_value("saccade_fetch_cache_requests_total", labels) or 0.0


# Fresh and stale.


def test_fresh_entries_are_not_fetched_again(run: Run, bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60")

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            first = await fetcher.fetch(bench.url, GROUP)
            bench.clock.now += 59
            assert await fetcher.fetch(bench.url, GROUP) is first
            assert len(picture.visits) == 1
            bench.clock.now += 1
            assert await fetcher.fetch(bench.url, GROUP) == first
            assert len(picture.visits) == 2

    run(fetch())
    assert (bench.cache.stats().hits, bench.cache.stats().misses) == (1, 2)


def test_stale_entries_are_revalidated(run: Run, bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60", 'ETag: "1"')

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            first = await fetcher.fetch(bench.url, GROUP)
            bench.clock.now += 100
            assert await fetcher.fetch(bench.url, GROUP) is first
            assert picture.visits[1].header("If-None-Match") == '"1"'
            bench.clock.now += 59
            assert await fetcher.fetch(bench.url, GROUP) is first
            assert len(picture.visits) == 2
            bench.clock.now += 1
            assert await fetcher.fetch(bench.url, GROUP) is first
            assert len(picture.visits) == 3
            assert bench.origin.connections == 1  # a 304 leaves the connection usable

    run(fetch())
    stats = bench.cache.stats()
    assert (stats.hits, stats.misses, stats.revalidated) == (1, 1, 2)


def test_changed_entries_are_replaced(bench: Bench) -> None:
    bench.put("Cache-Control: max-age=60", 'ETag: "1"', body=b"old")

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            assert await fetcher.fetch(bench.url, GROUP) == b"old"
            bench.clock.now += 60
            new = bench.put("Cache-Control: max-age=60", 'ETag: "2"', body=b"new")
            for _ in range(2):
                assert await fetcher.fetch(bench.url, GROUP) == b"new"
            assert len(new.visits) == 1

    asyncio.run(fetch())
    assert bench.cache.stats().entries == 1


def test_an_entry_whose_new_response_forbids_caching_is_dropped(bench: Bench) -> None:
    bench.put("Cache-Control: max-age=60", 'ETag: "1"')
    bench.outcome(1)
    bench.clock.now += 60
    bench.put("Cache-Control: no-store", 'ETag: "2"')
    assert bench.outcome(1).entries == 0


def test_an_entry_is_dropped_after_a_304_with_no_store(bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60", 'ETag: "1"')
    bench.outcome(1)
    bench.clock.now += 60
    picture.newer = ["Cache-Control: no-store"]
    assert bench.outcome(1).entries == 0


def test_a_304_updates_the_fields_it_contains(bench: Bench) -> None:
    """The other fields stay, except for the age and date of the first response."""
    picture = bench.put(
        f"Date: {bench.clock.date(-50)}", "Age: 50", "Cache-Control: max-age=60", 'ETag: "1"'
    )
    bench.outcome(1)
    bench.clock.now += 1000
    picture.newer = []
    assert bench.outcome(1).revalidated == 1
    bench.clock.now += 59
    assert bench.outcome(1).hits == 1
    bench.clock.now += 1
    picture.newer = ["Cache-Control: max-age=1000"]
    assert bench.outcome(1).revalidated == 2
    bench.clock.now += 999
    assert bench.outcome(1).hits == 2


def test_a_304_with_another_entity_tag_causes_a_full_fetch(bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60", 'ETag: "1"', body=b"old")
    bench.outcome(1)
    bench.clock.now += 60
    picture.newer, picture.body = ['ETag: "2"'], b"new"

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            assert await fetcher.fetch(bench.url, GROUP) == b"new"

    asyncio.run(fetch())
    assert [bool(visit.header("If-None-Match")) for visit in picture.visits] == [False, True, False]


@pytest.mark.parametrize("tag", ['"strong"', 'W/"weak"', '""', '"a,b"'])
@pytest.mark.parametrize("newer", ["{}", "W/{}"])
def test_matching_entity_tags_confirm_an_entry(bench: Bench, tag: str, newer: str) -> None:
    picture = bench.put(f"ETag: {tag}")
    picture.newer = [f"ETag: {newer.format(tag.removeprefix('W/'))}"]
    assert bench.outcome().revalidated == 1
    assert picture.visits[1].header("If-None-Match") == tag


@pytest.mark.parametrize("tag", ["bare", 'w/"1"', '"1', '"1" ', '"a" "b"', "W/", '"' + "x" * 5000])
def test_malformed_entity_tags_are_not_sent(bench: Bench, tag: str) -> None:
    picture = bench.put("Cache-Control: no-cache", f"ETag: {tag}")
    bench.outcome()
    sent = picture.visits[1].header("If-None-Match")
    assert sent == ('"1"' if tag == '"1" ' else "")  # HTTP ignores trailing spaces


def test_without_an_entity_tag_the_modification_date_is_sent(bench: Bench) -> None:
    modified = bench.clock.date(-5000)
    picture = bench.put(f"Last-Modified: {modified}")
    assert bench.outcome().revalidated == 1
    assert picture.visits[1].header("If-Modified-Since") == modified
    assert picture.visits[1].header("If-None-Match") == ""


@pytest.mark.parametrize("modified", ["yesterday", "0", "Sun, 06 Nov 1994 08:49:37 EST"])
def test_responses_without_lifetime_or_validator_are_not_kept(bench: Bench, modified: str) -> None:
    bench.put(f"Last-Modified: {modified}", f"Date: {bench.clock.date()}")
    assert bench.outcome() == CacheStats(0, 0, MIB, hits=0, misses=2, revalidated=0)


@pytest.mark.parametrize(
    "failure", ["/reset", "/status?code=503", "/status?code=404", "/garbage", "/silent"]
)
def test_a_failed_revalidation_fails_the_fetch(bench: Bench, failure: str) -> None:
    path, _, query = failure.partition("?")
    bench.url += "?" + query
    picture = bench.put("Cache-Control: max-age=60, stale-if-error=9999", 'ETag: "1"')
    bench.outcome(1)
    bench.clock.now += 60
    bench.origin.routes["/picture"] = bench.origin.routes[path]

    async def fetch() -> SaccadeError:
        async with bench.fetcher(timeout_s=1 if path == "/silent" else 30) as fetcher:
            return await failing(fetcher, bench.url)

    error = asyncio.run(fetch())
    assert isinstance(error, ImageFetchTimeout if path == "/silent" else ImageFetchFailed)
    assert 'If-None-Match: "1"' in bench.origin.heads[-1]
    bench.origin.routes["/picture"] = picture
    assert bench.outcome(1).revalidated == 1


# Freshness.


@pytest.mark.parametrize(
    ("control", "hits"),
    [
        ("max-age=60", 1),
        ("MAX-AGE=60", 1),
        ('max-age="60"', 1),
        ("max-age=99999999999999999999999999", 1),
        ("max-age=60, max-age=60", 1),
        ("public, max-age=60, immutable", 1),
        ("private, max-age=60", 1),
        ('private="set-cookie", max-age=60', 1),
        ("max-age=60, must-revalidate", 1),
        ('max-age=60,, ,ext="no-store, \\" ",other', 1),
        ("max-age=60, x-no-store", 1),
        ("", 0),
        ("max-age=0", 0),
        ("max-age=-60", 0),
        ("max-age=+60", 0),
        ("max-age=6_0", 0),
        ("max-age=1e3", 0),
        ("max-age=60.5", 0),
        ("max-age", 0),
        ("max-age=", 0),
        ("max-age = 60", 0),
        ("max-age=60, max-age=61", 0),
        ("max-age=\u00b2", 0),
        ("s-maxage=60", 0),
        ("max-age=60, no-store", 0),
        ("max-age=60, No-Store", 0),
        ("no-store=1, max-age=60", 0),
        ("max-age=60, no-cache", 0),
        ('max-age=60, no-cache="set-cookie"', 0),
        ("max-age=60; public", 0),
        ("max-age=60 no-store", 0),
        ('max-age=60, ext="no-store', 0),
    ],
)
def test_cache_control_decides_if_an_entry_is_fresh(bench: Bench, control: str, hits: int) -> None:
    bench.put(f"Cache-Control: {control}")
    assert bench.outcome().hits == hits


def test_no_store_is_obeyed_with_a_validator_too(bench: Bench) -> None:
    picture = bench.put("Cache-Control: no-store", 'ETag: "1"')
    assert bench.outcome().entries == 0
    assert picture.visits[1].header("If-None-Match") == ""


def test_no_cache_is_revalidated_each_time(bench: Bench) -> None:
    bench.put("Cache-Control: no-cache, max-age=60", 'ETag: "1"')
    assert bench.outcome(3).revalidated == 2


def dated(bench: Bench, lines: Sequence[str]) -> Iterator[str]:
    """The header lines, with a date in the place of "{+60}": 60 seconds from now."""
    for line in lines:
        name, brace, rest = line.partition("{")
        yield name + bench.clock.date(float(rest[:-1] or 0)) if brace else line


@pytest.mark.parametrize(
    ("headers", "hits"),
    [
        (["Cache-Control: max-age=60", "Cache-Control: public"], 1),
        (["Cache-Control: max-age=60", "Cache-Control: no-store"], 0),
        (["Cache-Control: max-age=60", "Cache-Control: max-age=0"], 0),
        (["Expires: {+60}", "Date: {}"], 1),
        (["Expires: {+60}"], 0),
        (["Expires: {+60}", "Expires: {+60}", "Date: {}"], 1),
        (["Expires: {+60}", "Expires: {+90}"], 0),
        (["Expires: {}", "Date: {}"], 0),
        (["Expires: 0"], 0),
        (["Expires: {+60}", "Cache-Control: max-age=0"], 0),
        (["Expires: {+60}", "Cache-Control: max-age=soon"], 0),
        (["Expires: {-60}", "Cache-Control: max-age=60"], 1),
        (["Expires: {+60}", "Date: {+30}"], 1),
        (["Expires: {+60}", "Date: {+60}"], 0),
        (["Expires: {+60}", "Date: garbage"], 0),
        (["Expires: Fri, 31 Dec 99999 23:59:59 GMT", "Date: {}"], 0),
        (["Expires: Fri, 31 Dec 2100 23:59:59 +0000", "Date: {}"], 0),
        (["Expires: Friday, 31-Dec-60 23:59:59 GMT", "Date: {}"], 1),
        (["Expires: Fri Dec 31 23:59:59 2060", "Date: {}"], 1),
        (["Cache-Control: max-age=60", "Date: {-59}"], 1),
        (["Cache-Control: max-age=60", "Date: {-60}"], 0),
        (["Cache-Control: max-age=60", "Date: {+9999}"], 1),
        (["Cache-Control: max-age=60", "Age: 59"], 1),
        (["Cache-Control: max-age=60", "Age: 60"], 0),
        (["Cache-Control: max-age=60", "Age: -5"], 1),
        (["Cache-Control: max-age=60", "Age: old"], 1),
        (["Cache-Control: max-age=60", "Age: 99999999999999999999"], 0),
        (["Cache-Control: max-age=60", "Age: 60, 1"], 0),
        (["Cache-Control: max-age=60", "Age: 60", "Age: 1"], 0),
        (["Cache-Control: max-age=60", "Age: 10", "Date: {-60}"], 0),
        (["Cache-Control: max-age=60", "Vary: Accept-Encoding"], 1),
        (["Cache-Control: max-age=60", "Vary: Accept, Origin"], 1),
        (["Cache-Control: max-age=60", "Vary: *"], 0),
        (["Cache-Control: max-age=60", "Vary: Accept", "Vary: Origin , *"], 0),
        (["Cache-Control: max-age=60", "Set-Cookie: a=b", "Pragma: no-cache"], 1),
        (["Cache-Control: max-age=60", 'ETag: "1"', 'ETag: "2"'], 1),
    ],
)
def test_header_fields_decide_if_an_entry_is_fresh(
    bench: Bench, headers: list[str], hits: int
) -> None:
    bench.put(*dated(bench, headers))
    assert bench.outcome().hits == hits


DAY_S = 86_400.0


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
@pytest.mark.parametrize(
    "headers",
    [["Cache-Control: max-age=60"], ["Cache-Control: max-age=60", "Age: 0"], ["Expires: {+60}"]],
)
def test_a_jump_of_the_clock_does_not_change_how_long_an_entry_is_fresh(
    bench: Bench, headers: list[str], jump_s: float
) -> None:
    picture = bench.put(*dated(bench, ["Date: {}", *headers]))
    bench.outcome(1)
    bench.clock.ahead_s += jump_s
    bench.clock.now += 59
    bench.outcome(1)
    assert len(picture.visits) == 1
    bench.clock.now += 1
    bench.outcome(1)
    assert len(picture.visits) == 2


@pytest.mark.parametrize("ahead_s", [DAY_S, -DAY_S, -1.8e9])
@pytest.mark.parametrize(
    "headers",
    [
        ["Cache-Control: max-age=60", "Date: {}"],
        ["Cache-Control: max-age=60"],
        ["Expires: {+60}", "Date: {}"],
        ["Expires: {+60}"],
    ],
)
def test_no_entry_is_fresh_for_longer_while_the_clock_is_wrong(
    bench: Bench, headers: list[str], ahead_s: float
) -> None:
    picture = bench.put(*dated(bench, headers))  # by the origin's clock
    bench.clock.ahead_s = ahead_s
    bench.outcome(1)
    bench.clock.now += 60
    bench.outcome(1)
    assert len(picture.visits) == 2


def test_an_unrepresentably_long_lifetime_is_bounded(bench: Bench) -> None:
    bench.put("Cache-Control: max-age=" + "9" * 1000)
    assert bench.outcome().hits == 1
    bench.clock.now += (1 << 31) + 1
    assert bench.outcome(1).hits == 1


def test_the_duration_of_the_fetch_counts_towards_the_age(bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60", "Age: 20")
    picture.hold()

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            fetching = asyncio.create_task(fetcher.fetch(bench.url, GROUP))
            await asyncio.to_thread(bench.origin.wait, lambda _: bool(picture.visits))
            bench.clock.now += 30
            picture.answer()
            await fetching
            bench.clock.now += 9
            await fetcher.fetch(bench.url, GROUP)
            assert len(picture.visits) == 1
            bench.clock.now += 1
            await fetcher.fetch(bench.url, GROUP)
            assert len(picture.visits) == 2

    asyncio.run(fetch())


def test_the_local_time_zone_does_not_change_lifetimes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        made = (b"date", b"Sun Nov  6 08:49:27 1994")
        head = ResponseHead.of([made, (b"expires", b"Sun Nov  6 08:49:37 1994")])
        assert head.fresh_s(784111777.0 - 10, 0) == 10
    finally:
        monkeypatch.undo()
        time.tzset()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"age", b"cache-control", b"date", b"etag", b"expires", b"last-modified", b"vary"]
            ),
            st.one_of(
                st.binary(max_size=80),
                st.from_regex(rb'[a-zA-Z0-9 ,:="\\*+-]{0,60}(GMT|[0-9]{4})?', fullmatch=True),
            ),
        )
    )
)
def test_arbitrary_heads_are_handled(headers: list[HttpHeader]) -> None:
    head = ResponseHead.of(headers)
    head.may_be_kept()
    head.conditions()
    assert abs(head.fresh_s(1.8e9, 1.0)) < 1e12
    assert ResponseHead.of(headers).updated(head).is_confirmed_by(head)


@pytest.mark.parametrize(
    "end",
    [b" " * 10**6 + b"\x00", b'a="' + b"\\" * 10**6, b"a" * 10**6 + b"\x00"],
    ids=["spaces", "escapes", "letters"],
)
def test_malformed_cache_control_of_a_megabyte_is_refused_in_linear_time(end: bytes) -> None:
    """In quadratic time this would take hours and exceed the test's timeout."""
    head = ResponseHead.of([(b"cache-control", b"max-age=60," + end)])
    assert head.fresh_s(0, 0) == 0


# Groups.


def test_groups_share_no_entries(run: Run, bench: Bench) -> None:
    picture = bench.put("Cache-Control: public, max-age=60")

    async def of_group(fetcher: Fetcher, group: str) -> None:
        await fetcher.fetch(bench.url, group)

    async def each() -> None:
        async with bench.fetcher() as fetcher:
            for n, group in enumerate(["one", "two", "", "one", "two", ""]):
                await asyncio.create_task(of_group(fetcher, group))
                assert len(picture.visits) == min(n + 1, 3)

    run(each())
    assert bench.cache.stats().hits == 3


def test_groups_share_no_request_in_flight(run: Run, bench: Bench) -> None:
    picture = bench.put("Cache-Control: no-store")
    picture.hold()

    async def of_group(fetcher: Fetcher, group: str) -> None:
        await fetcher.fetch(bench.url, group)

    async def all_at_once() -> None:
        async with bench.fetcher() as fetcher:
            fetches = [
                asyncio.create_task(of_group(fetcher, group)) for group in ("one", "two", "one", "")
            ]
            await asyncio.to_thread(bench.origin.wait, lambda it: it.busy == 3)
            picture.answer()
            await asyncio.gather(*fetches)

    run(all_at_once())
    assert len(picture.visits) == 3


# URLs.


def test_entries_are_keyed_by_the_requested_url(bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60")

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for query in ("", "?", "?a", "?a=%41", "?a=A"):
                await fetcher.fetch(bench.url + query, GROUP)
            assert len(picture.visits) == 5
            await fetcher.fetch(bench.url + "#fragment", GROUP)
            await fetcher.fetch(bench.url.replace("http", "HTTP") + "?a#other", GROUP)
            assert len(picture.visits) == 5
            await fetcher.fetch(bench.url.replace("127.0.0.1", "localhost"), GROUP)
            assert len(picture.visits) == 6

    asyncio.run(fetch())


def test_each_redirect_target_is_cached_under_its_own_url(bench: Bench) -> None:
    """The redirect is requested again; its target is cached by the target's own headers."""
    picture = bench.put("Cache-Control: max-age=60")
    redirects: list[Visit] = []

    async def redirect(visit: Visit) -> None:
        redirects.append(visit)
        headers = ("Location: /picture", "Cache-Control: max-age=60")
        await visit.respond("301 Moved Permanently", b"", *headers)

    async def chain(visit: Visit) -> None:
        redirects.append(visit)
        await visit.respond("302 Found", b"", "Location: /redirect", "Cache-Control: no-store")

    bench.origin.routes.update({"/redirect": redirect, "/chain": chain})

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for path in ("/chain", "/chain", "/redirect", "/picture"):
                assert await fetcher.fetch(bench.origin.url(path), GROUP) == b"picture"

    asyncio.run(fetch())
    assert (len(redirects), len(picture.visits)) == (5, 1)
    assert bench.cache.stats().entries == 1


def test_a_cached_url_that_now_redirects_is_followed(bench: Bench) -> None:
    bench.put("Cache-Control: max-age=60", 'ETag: "1"', body=b"old")
    bench.put(body=b"new", path="/new")
    bench.outcome(1)
    bench.clock.now += 60

    async def moved(visit: Visit) -> None:
        await visit.respond("302 Found", b"", "Location: /new")

    async def fetch() -> bytes:
        async with bench.fetcher() as fetcher:
            return await fetcher.fetch(bench.url, GROUP)

    bench.origin.routes["/picture"] = moved
    assert asyncio.run(fetch()) == b"new"


@pytest.mark.parametrize("path", ["/picture", "/redirect?to=/picture"])
def test_blocked_urls_are_not_served_from_the_cache(bench: Bench, path: str) -> None:
    picture = bench.put("Cache-Control: max-age=60")
    bench.url = bench.origin.url(path)
    bench.outcome()

    async def fetch() -> list[SaccadeError]:
        async with bench.fetcher(only_hosts=("elsewhere.test",)) as fetcher:
            return [
                await failing(fetcher, bench.url),
                await failing(fetcher, bench.url.replace("//", "//user@")),
            ]

    blocked, invalid = asyncio.run(fetch())
    assert isinstance(blocked, ImageUrlBlocked)
    assert isinstance(invalid, InvalidImageUrl)
    assert len(picture.visits) == 1


@pytest.mark.parametrize("path", ["/status?code=404", "/status?code=203", "/status?code=304"])
def test_other_statuses_are_not_kept(bench: Bench, path: str) -> None:
    async def answers(visit: Visit) -> None:
        await visit.respond(f"{visit.query('code')} Whatever", b"", "Cache-Control: max-age=60")

    bench.origin.routes["/status"] = answers

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for _ in range(2):
                assert isinstance(await failing(fetcher, bench.origin.url(path)), ImageFetchFailed)

    asyncio.run(fetch())
    assert len(bench.origin.heads) == 2
    assert bench.cache.stats().entries == 0


# Bodies and bytes.


def test_compressed_bodies_are_cached_unchanged(bench: Bench) -> None:
    plain = b"x" * 1000
    compressed = gzip.compress(plain)
    bench.put("Cache-Control: max-age=60", "Content-Encoding: gzip", body=compressed)

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for _ in range(2):
                assert await fetcher.fetch(bench.url, GROUP) == plain
            assert isinstance(await failing(fetcher, bench.url, 999), ImageTooLarge)

    asyncio.run(fetch())
    stats = bench.cache.stats()
    assert stats.entries == 1
    assert stats.bytes > len(plain) + ENTRY_BYTES


@pytest.mark.parametrize("later_s", [0, 60])
def test_the_size_limit_of_a_fetch_applies_to_cached_entries(bench: Bench, later_s: int) -> None:
    bench.put("Cache-Control: max-age=60", 'ETag: "1"', body=b"x" * 1000)

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            await fetcher.fetch(bench.url, GROUP)
            bench.clock.now += later_s
            assert isinstance(await failing(fetcher, bench.url, 999), ImageTooLarge)
            assert len(await fetcher.fetch(bench.url, GROUP, 1000)) == 1000

    asyncio.run(fetch())


def test_a_truncated_body_is_not_kept(bench: Bench) -> None:
    async def breaks_off(visit: Visit) -> None:
        head = b"HTTP/1.1 200 OK\r\nCache-Control: max-age=60\r\nContent-Length: 9\r\n\r\n"
        await visit.send(head, b"half")
        visit.writer.close()

    bench.origin.routes["/picture"] = breaks_off

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            await failing(fetcher, bench.url)
        assert bench.cache.stats().entries == 0

    asyncio.run(fetch())


def test_the_least_recently_used_entry_is_evicted_first(bench: Bench) -> None:
    each = 100_000
    bench.put("Cache-Control: max-age=60", body=b"x" * each)

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for n in range(10):
                await fetcher.fetch(f"{bench.url}?{n}", GROUP)
            await fetcher.fetch(f"{bench.url}?0", GROUP)
            await fetcher.fetch(f"{bench.url}?10", GROUP)
            assert len(bench.origin.heads) == 11
            await fetcher.fetch(f"{bench.url}?0", GROUP)
            assert len(bench.origin.heads) == 11
            await fetcher.fetch(f"{bench.url}?1", GROUP)
            assert len(bench.origin.heads) == 12

    asyncio.run(fetch())
    stats = bench.cache.stats()
    assert stats.entries == 10
    assert 10 * each < stats.bytes <= stats.max_bytes == MIB
    assert REGISTRY.get_sample_value("saccade_fetch_cache_bytes") == stats.bytes


def test_empty_images_count_towards_the_size(bench: Bench) -> None:
    bench.cache = FetchCache(20 * ENTRY_BYTES, bench.clock)
    bench.put("Cache-Control: max-age=60", body=b"")

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for n in range(50):
                await fetcher.fetch(f"{bench.url}?{n}", GROUP)

    asyncio.run(fetch())
    assert 0 < bench.cache.stats().entries < 20


@pytest.mark.parametrize(("size", "entries"), [(MIB // 8 - 3000, 1), (MIB // 8, 0)])
def test_entries_above_the_maximum_share_are_not_kept(
    bench: Bench, size: int, entries: int
) -> None:
    bench.put("Cache-Control: max-age=60", body=b"x" * size)
    assert bench.outcome().entries == entries


def test_long_urls_and_heads_count_towards_the_size(bench: Bench) -> None:
    bench.put("Cache-Control: max-age=60", f'ETag: "{"x" * 3000}"')
    bench.url += "?" + "x" * 5000
    assert bench.outcome().bytes > ENTRY_BYTES + 8000


@pytest.mark.parametrize("headers", [["Vary: " + "Accept, " * 1000], ["Vary:"] * 200])
def test_heads_that_are_too_long_are_not_kept(bench: Bench, headers: list[str]) -> None:
    bench.put("Cache-Control: max-age=60", *headers)
    assert bench.outcome().entries == 0


# Concurrent fetches.


def test_concurrent_fetches_share_a_revalidation(run: Run, bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60", 'ETag: "1"')

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            await fetcher.fetch(bench.url, GROUP)
            bench.clock.now += 60
            bodies = await asyncio.gather(*(fetcher.fetch(bench.url, GROUP) for _ in range(10)))
            assert len({id(body) for body in bodies}) == 1

    run(fetch())
    assert len(picture.visits) == 2
    assert bench.cache.stats().revalidated == 1


def test_concurrent_fetches_with_different_limits_share_an_entry(run: Run, bench: Bench) -> None:
    bench.put("Cache-Control: max-age=60", 'ETag: "1"', body=b"x" * 1000)

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            for _ in range(3):
                await asyncio.gather(
                    *(fetcher.fetch(bench.url, GROUP, 1000 + n) for n in range(10))
                )
                bench.clock.now += 60

    run(fetch())
    assert bench.cache.stats().entries == 1


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_cancelled_fetch_does_not_affect_others(run: Run, bench: Bench, is_kept: bool) -> None:
    picture = bench.put("Cache-Control: max-age=60", 'ETag: "1"')

    async def fetch() -> None:
        async with bench.fetcher() as fetcher:
            if is_kept:
                await fetcher.fetch(bench.url, GROUP)
                bench.clock.now += 60
            before = bench.cache.stats()
            picture.hold()
            fetching = asyncio.create_task(fetcher.fetch(bench.url, GROUP))
            await asyncio.to_thread(bench.origin.wait, lambda it: it.busy == 1)
            fetching.cancel()
            await asyncio.wait([fetching])
            assert bench.cache.stats() == before
            picture.answer()
            assert await fetcher.fetch(bench.url, GROUP) == b"picture"
            assert bench.cache.stats().revalidated == is_kept
            assert await fetcher.fetch(bench.url, GROUP) == b"picture"

    run(fetch())
    assert bench.cache.stats().hits == 1


def test_clearing_removes_all_entries(bench: Bench) -> None:
    bench.put("Cache-Control: max-age=60")
    assert bench.outcome().entries == 1
    bench.cache.clear()
    assert bench.cache.stats() == CacheStats(0, 0, MIB, hits=1, misses=1, revalidated=0)
    assert bench.outcome(1).misses == 2


def test_a_fetcher_without_a_cache_fetches_each_time(bench: Bench) -> None:
    picture = bench.put("Cache-Control: max-age=60", 'ETag: "1"')

    async def fetch() -> None:
        async with Fetcher(FetchSettings(allow_private=True)) as fetcher:
            assert fetcher.cache is None
            for _ in range(2):
                assert await fetcher.fetch(bench.url, GROUP) == b"picture"

    asyncio.run(fetch())
    assert [visit.header("If-None-Match") for visit in picture.visits] == ["", ""]


def test_every_outcome_is_counted(bench: Bench) -> None:
    results = ("hit", "miss", "revalidated", "bypass")
    before = [counted(result) for result in results]
    bench.put("Cache-Control: max-age=60", 'ETag: "1"')
    bench.outcome(4)
    bench.clock.now += 60
    bench.outcome(1)
    bench.put("Cache-Control: no-store", path="/other")
    bench.url = bench.origin.url("/other")
    bench.outcome(2)
    after = [counted(result) for result in results]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 1, 2]

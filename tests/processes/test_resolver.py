"""Lookups with a real nameserver that answers for some names and not for others."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from ipaddress import ip_address
from typing import Any

import pytest
import uvloop

from server.errors import ImageFetchFailed, ImageFetchTimeout, ImageUrlBlocked, SaccadeError
from server.ingest.fetch import Fetcher, FetchSettings
from server.ingest.guard import MAX_ADDRESSES_DIALLED, MAX_ADDRESSES_READ, SystemLookup
from tests.hostile_origin import HostileOrigin
from tests.nameserver import nameserver

Run = Callable[[Coroutine[Any, Any, Any]], Any]
# More than the fetches that may go on at a time.
HANGING = 500


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


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


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


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
        settings = FetchSettings(allow_private=True, timeout_s=6)
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
                assert not any(task.done() for task in hanging)
                await asyncio.sleep(0.01)
            assert threading.active_count() <= threads
            assert await fetcher.fetch(origin.url("/ok?again", "other.test"), "")
            assert not any(task.done() for task in hanging)
            errors = await asyncio.gather(*hanging)
            assert {type(error) for error in errors} == {ImageFetchTimeout}
            await asyncio.sleep(1)  # for queries under way
            asked = len(dns.asked)
            await asyncio.sleep(2)  # c-ares would repeat its queries
            assert len(dns.asked) == asked, "the lookups went on after their fetches"

    with (
        HostileOrigin() as origin,
        nameserver(images_test="127.0.0.1", other_test="127.0.0.1") as dns,
    ):
        run(many())


def test_few_lookups_go_on_after_their_fetches_while_others_wait(run: Run) -> None:
    """Beside a lookup that someone always waits for, those that were cancelled must end, too."""

    async def many() -> None:
        async with system_lookup(dns.address) as lookup:
            waits: list[asyncio.Task[Any]] = []
            for turn in range(8):
                lookups = [
                    asyncio.create_task(lookup(f"hanging{turn}-{n}.test", 80)) for n in range(100)
                ]
                while len({name for name in dns.asked if f"hanging{turn}-" in name}) < 100:
                    await asyncio.sleep(0.01)
                await cancel(*waits, *lookups[1:])
                waits = lookups[:1]
            await asyncio.sleep(2)  # for queries under way
            asked = len(dns.asked)
            await asyncio.sleep(2)
            repeated = set(dns.asked[asked:])
            assert {name.partition("-")[0] for name in repeated} <= {"hanging7"}
            await cancel(*waits)

    with nameserver() as dns:
        run(many())


FAILURES: dict[str, tuple[type[SaccadeError], ...]] = {
    "nowhere.test": (ImageFetchFailed,),
    "servfail.test": (ImageFetchFailed,),
    "refused.test": (ImageFetchFailed,),
    "loop.test": (ImageFetchFailed,),
    "garbage.test": (ImageFetchFailed, ImageFetchTimeout),
    "forged.test": (ImageFetchTimeout,),
    "hanging.test": (ImageFetchTimeout,),
    "half.test": (ImageFetchFailed, ImageFetchTimeout),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_name_that_cannot_be_resolved_fails_within_the_deadline(run: Run, name: str) -> None:
    async def fetch() -> SaccadeError:
        ends = ImageFetchTimeout in FAILURES[name]
        settings = FetchSettings(allow_private=True, timeout_s=1 if ends else 30)
        patient = FetchSettings(allow_private=True, timeout_s=30)
        async with (
            system_lookup(dns.address) as lookup,
            Fetcher(settings, lookup=lookup) as fetcher,
            Fetcher(patient, lookup=lookup) as other,
        ):
            error = await failure(fetcher, origin.url("/ok", name))
            assert await other.fetch(origin.url("/ok", "images.test"), "")
            return error

    with HostileOrigin() as origin, nameserver(images_test="127.0.0.1") as dns:
        assert isinstance(run(fetch()), FAILURES[name])


def test_a_nameserver_that_does_not_run_fails_the_fetch(run: Run) -> None:
    async def fetch() -> SaccadeError:
        async with (
            system_lookup(dns.address) as lookup,
            Fetcher(FetchSettings(timeout_s=10), lookup=lookup) as fetcher,
        ):
            return await failure(fetcher, "http://images.test/")

    with nameserver() as dns:
        pass
    assert isinstance(run(fetch()), ImageFetchFailed)


@pytest.mark.parametrize("name", ["tcp.test", "many.test", "huge.test"])
def test_long_answers_are_read_over_tcp(run: Run, name: str) -> None:
    async def fetch() -> None:
        async with (
            system_lookup(dns.address) as lookup,
            Fetcher(FetchSettings(allow_private=True), lookup=lookup) as fetcher,
        ):
            found = await lookup(name, 80)
            assert len(found) == (1 if name == "tcp.test" else MAX_ADDRESSES_READ)
            assert len(found) >= MAX_ADDRESSES_DIALLED or len(found) == 1
            assert await fetcher.fetch(origin.url("/ok", name), "")

    with HostileOrigin("0.0.0.0") as origin, nameserver() as dns:
        dns.addresses[name] = "127.0.0.1"
        run(fetch())


def test_a_slow_answer_within_the_deadline_is_used() -> None:
    async def fetch() -> None:
        # c-ares drops late answers to questions that it has repeated since: an answer that was slow
        # for each question would take 10 s.
        settings = FetchSettings(allow_private=True, timeout_s=8)
        async with (
            system_lookup(dns.address) as lookup,
            Fetcher(settings, lookup=lookup) as fetcher,
        ):
            assert await fetcher.fetch(origin.url("/ok", "slow.test"), "")

    with HostileOrigin() as origin, nameserver(slow_test="127.0.0.1") as dns:
        uvloop.run(fetch())


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

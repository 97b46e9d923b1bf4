"""The shared tier of the embedding cache with a Redis that is slow, wrong, dead, or dies."""

import contextlib
import logging
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from server.engine.embedding_cache import shared
from server.engine.embedding_cache import tier as tier_module
from server.engine.embedding_cache.arena import PAGE_BYTES, Arena
from server.engine.embedding_cache.disk import DiskTier
from server.engine.embedding_cache.shared import SharedTier
from server.engine.embedding_cache.store import EmbeddingStore, stored_name
from tests import broken_redis
from tests.broken_redis import BrokenRedis, Fault, breaks, dies, drips, floods, on, replies
from tests.embeddings import (
    NAMESPACE,
    PAGE,
    WAIT_S,
    content,
    fail,
    joined,
    keep,
    opened,
    pieces,
    recover,
    seek,
    share,
    stored,
    wait_until,
)
from tests.redis_server import RedisServer, redis_server

PASSWORD = "hunter2-secret"
MB = 1 << 20
READ, WRITE = b"GETRANGE", b"$3\r\nSET\r\n"

REPLIES: dict[str, Fault] = {
    "late": broken_redis.answers_late,
    "trickle": broken_redis.trickles,
    "web server": broken_redis.is_a_web_server,
    "echo": broken_redis.echoes,
    "garbage": broken_redis.sends_garbage,
    "closes at once": broken_redis.closes_at_once,
    "resets at once": broken_redis.resets_at_once,
    "never answers": broken_redis.never_answers,
    "never reads": broken_redis.never_reads,
}
READS: dict[str, Fault] = {
    "100 GB": on(READ, floods(b"$107374182400\r\n")),
    "512 MB": on(READ, floods(b"$536870912\r\n")),
    "512 MB slowly": on(READ, drips(b"$536870912\r\n")),
    "a line without end": on(READ, floods(b"+")),
    "a million replies": on(READ, floods(b"*999999999\r\n", b"$-1\r\n" * 10_000)),
    "nested replies": on(READ, floods(b"", b"*1\r\n" * 10_000)),
    "an impossible length": on(READ, replies(b"$" + b"9" * 3000 + b"\r\n")),
    "no number": on(READ, replies(b"$hunter2\r\n")),
    "a number": on(READ, replies(b":5\r\n")),
    "a push message": on(READ, floods(b"", b">2\r\n+invalidate\r\n*0\r\n" * 1000)),
    "loading": on(READ, replies(b"-LOADING Redis is loading the dataset in memory\r\n")),
    "moved": on(READ, replies(b"-MOVED 3999 127.0.0.1:1\r\n")),
    "busy": on(READ, replies(b"-BUSY Redis is busy running a script.\r\n")),
    "dies": on(READ, breaks),
}
WRITES: dict[str, Fault] = {
    "dies": on(WRITE, dies),
    "stops reading": on(WRITE, broken_redis.stops_reading),
    "read-only": on(WRITE, replies(b"-READONLY You can't write against a read only replica.\r\n")),
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_CALL_TIMEOUT_S", 0.4)
    monkeypatch.setattr(tier_module, "FIRST_PAUSE_S", 0.2)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Calls that must succeed may take long on a busy machine."""
    before, shared._CALL_TIMEOUT_S = shared._CALL_TIMEOUT_S, WAIT_S
    try:
        yield
    finally:
        shared._CALL_TIMEOUT_S = before


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server(password=PASSWORD) as server:
        yield server


@pytest.fixture
def relay(redis: RedisServer) -> Iterator[BrokenRedis]:
    with BrokenRedis(redis.port) as running:
        yield running


def url(port: int, scheme: str = "redis", options: str = "") -> str:
    return f"{scheme}://:{PASSWORD}@127.0.0.1:{port}/0{options}"


def fail_writing(store: EmbeddingStore, tier: SharedTier) -> None:
    """Write entries until the circuit breaker opens."""
    for number in range(20):
        share(store, f"unwritten{number}")
        if tier.breaker.is_open:
            break
    assert tier.breaker.is_open


def check_log(caplog: pytest.LogCaptureFixture) -> None:
    """The log tells of one failure and its end, and nothing else."""
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [("failing" in line, "works again" in line) for line in said] == [
        (True, False),
        (False, True),
    ]
    assert "hunter2" not in caplog.text
    assert max(map(len, said)) < 200


def check_recovered(store: EmbeddingStore, tier: SharedTier) -> None:
    """Entries are shared again, and what a fault left behind answers no other call."""
    with patient():
        recover(store, tier)
        share(store, "after")
        with opened(tier_url(tier)) as (other, _):
            assert seek(other, "after") == content("after")


def tier_url(tier: SharedTier) -> str:
    return url(int(tier._pool.connection_kwargs["port"]))


@pytest.mark.parametrize("fault", [*REPLIES, *READS])
def test_reads_of_a_broken_redis_are_misses(
    fault: str, relay: BrokenRedis, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(url(relay.port)) as (store, tier):
        share(store, "before")
        relay.fault = (REPLIES | READS)[fault]
        tracemalloc.start()
        try:
            fail(store, tier)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 * MB, "memory grows with what the peer sends"
        assert keep(store, "meanwhile")
        assert stored(store, "meanwhile") == content("meanwhile")
        assert stored(store, "before") == content("before")
        relay.fault = broken_redis.works
        check_recovered(store, tier)
    check_log(caplog)


@pytest.mark.parametrize("fault", [*REPLIES, *WRITES])
def test_writes_to_a_broken_redis_are_dropped(
    fault: str, relay: BrokenRedis, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(url(relay.port)) as (store, tier):
        relay.fault = (REPLIES | WRITES)[fault]
        fail_writing(store, tier)
        assert tier.counts.errors >= 3
        assert stored(store, "unwritten0") == content("unwritten0")
        relay.fault = broken_redis.works
        check_recovered(store, tier)
    check_log(caplog)


def test_a_clear_ends_with_a_redis_whose_scan_never_ends(relay: BrokenRedis) -> None:
    endless = b"*2\r\n$1\r\n7\r\n*0\r\n"
    with contextlib.closing(SharedTier(url(relay.port), NAMESPACE, 7)) as tier:
        relay.fault = on(b"SCAN", replies(endless))
        failed: list[BaseException] = []

        def clear() -> None:
            try:
                tier.clear()
            except OSError as error:
                failed.append(error)

        clearing = threading.Thread(target=clear)
        clearing.start()
        wait_until(lambda: relay.connections)
        tier.close()
        clearing.join(WAIT_S)
        assert not clearing.is_alive()
        assert failed


def test_a_replica_that_takes_no_writes_is_read_from(caplog: pytest.LogCaptureFixture) -> None:
    with (
        patient(),
        redis_server("--replica-read-only", "yes") as server,
        opened(server.url) as (store, tier),
        contextlib.closing(server.client()) as client,
    ):
        share(store, "before")
        client.replicaof("127.0.0.1", 1)
        fail_writing(store, tier)
        with opened(server.url) as (other, reader):
            assert seek(other, "before") == content("before")
            assert (reader.counts.hits, reader.counts.errors) == (1, 0)
        client.replicaof("NO", "ONE")
        recover(store, tier)
        share(store, "after")
        assert client.exists(tier._prefix + stored_name("after"))
    assert "ReadOnlyError" in caplog.text
    check_log(caplog)


def test_a_redis_that_wants_another_password_is_used_again_with_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        redis_server(password=PASSWORD) as server,
        opened(server.url) as (store, tier),
        contextlib.closing(server.client()) as client,
    ):
        client.config_set("requirepass", "other")
        client.client_kill_filter(_type="normal", skipme=True)
        fail(store, tier)
        client.config_set("requirepass", PASSWORD)
        recover(store, tier)
    assert "AuthenticationError" in caplog.text
    check_log(caplog)


def test_a_cluster_node_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real node of a cluster that does not serve the slot."""
    node = RedisServer("--cluster-enabled", "yes", "--dir", str(tmp_path))
    node.port = port_of_a_node()
    node.start()
    try:
        with opened(node.url) as (store, tier):
            fail(store, tier)
            assert keep(store, "meanwhile")
    finally:
        node.stop()
    assert "ClusterDownError" in caplog.text


def port_of_a_node() -> int:
    """A free port, so that the one for the other nodes, which is higher by 10,000, is free too."""
    for port in range(20_000, 22_000):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port
    raise AssertionError("no ports are free")


@contextlib.contextmanager
def dropping(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port whose full backlog drops the first packet of each connection."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(4):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_a_redis_that_accepts_no_connection_causes_errors(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    with dropping() as port, opened(url(port, scheme)) as (store, tier):
        fail(store, tier)
        assert keep(store, "meanwhile")
    assert "hunter2" not in caplog.text


def test_a_tls_handshake_that_is_never_answered_ends(relay: BrokenRedis) -> None:
    relay.fault = broken_redis.never_answers
    with opened(url(relay.port, "rediss")) as (store, tier):
        fail(store, tier)


def test_entries_are_shared_over_tls(redis: RedisServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with BrokenRedis(redis.port, tls) as relay:
        address = url(relay.port, "rediss", f"?ssl_ca_certs={tmp_path / 'ca.pem'}")
        with contextlib.closing(SharedTier(address, NAMESPACE, 7)) as tier:
            check_copy(tier, "over TLS")
        relay.fault = broken_redis.trickles
        with opened(address) as (store, tier):
            fail(store, tier)
            relay.fault = broken_redis.works
            recover(store, tier)


def test_entries_are_shared_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis"
    with (
        redis_server("--unixsocket", str(path)),
        contextlib.closing(SharedTier(f"unix://{path}", NAMESPACE, 7)) as tier,
    ):
        check_copy(tier, "over a socket")
    with opened(f"unix://{path}") as (store, tier):
        fail(store, tier)


def check_copy(tier: SharedTier, key: str) -> None:
    into = pieces(bytes(PAGE.nbytes))
    with patient():
        tier.write(stored_name(key), PAGE, pieces(content(key)))
        assert tier.read(stored_name(key), PAGE, into)
        assert joined(into) == content(key)
        tier.clear()
        assert not tier.read(stored_name(key), PAGE, into)


def test_a_nameserver_that_hangs_holds_one_thread(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's resolver has no deadline."""
    answers, asked = threading.Event(), []
    resolve = socket.getaddrinfo

    def hangs(host: Any, *args: Any, **options: Any) -> Any:
        if host != "redis.test" or options.get("flags"):
            return resolve(host, *args, **options)
        asked.append(host)
        assert answers.wait(WAIT_S)
        return resolve("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with opened(url(redis.port).replace("127.0.0.1", "redis.test")) as (store, tier):
        fail(store, tier)
        assert asked == ["redis.test"]
        answers.set()
        with patient():
            recover(store, tier)
            share(store, "after")
            assert tier.read(stored_name("after"), PAGE, pieces(bytes(PAGE.nbytes)))


def test_the_other_addresses_of_a_name_are_tried_when_one_does_not_answer(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_CALL_TIMEOUT_S", 4.0)
    resolve = socket.getaddrinfo

    def two_addresses(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != "redis.test" or options.get("flags"):
            return resolve(host, port, *args, **options)
        of = [resolve(each, port, *args, **options) for each in ("127.0.0.2", "127.0.0.1")]
        return [address for found in of for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    address = url(redis.port).replace("127.0.0.1", "redis.test")
    with dropping("127.0.0.2", redis.port), opened(address) as (store, tier):
        share(store, "two addresses")
        assert tier.counts.errors == 0
        assert tier.read(stored_name("two addresses"), PAGE, pieces(bytes(PAGE.nbytes)))


def test_the_log_tells_rarely_of_damaged_entries(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        patient(),
        opened(redis.url) as (store, tier),
        contextlib.closing(redis.client()) as client,
    ):
        for number in range(20):
            client.set(tier._prefix + stored_name(f"damaged{number}"), b"damaged")
        for number in range(20):
            assert seek(store, f"damaged{number}") is None
        assert tier.counts.errors == 20
    assert len(caplog.records) == 1


def test_a_dead_redis_that_cannot_be_cleared_leaves_the_disk_in_use(tmp_path: Path) -> None:
    with redis_server() as server:
        dead = SharedTier(server.url, NAMESPACE, 7)
    disk, other = (DiskTier(tmp_path, NAMESPACE, 1 << 30) for _ in range(2))
    store = EmbeddingStore(Arena(8 * PAGE_BYTES), [disk, dead])
    try:
        assert keep(store, "before")
        wait_until(lambda: not store._writes)
        store.clear()
        wait_until(lambda: disk not in store._clears)
        assert dead in store._clears
        assert seek(store, "before") is None
        other.write(stored_name("after"), PAGE, pieces(content("after")))
        assert seek(store, "after") == content("after")
    finally:
        store.detach()
        store.close()

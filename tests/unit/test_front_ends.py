"""Several front ends, as far as they need no engine: flags, shares, limits, metrics and files."""

import asyncio
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server import front_ends, shares
from server.errors import ImageTooLarge, RateLimited, UnknownFile
from server.front_ends import Engines, FrontEnd, Link
from server.ingest.files import FileReader, FileStore, Quota
from server.request.limits import Limits, Usage
from server.request.shared_usage import SharedUsages
from server.settings import Settings
from server.telemetry import merged

WORDS = {
    "": False,
    "serve": False,
    "model --api-server-count 2": True,
    "--api-server-count=2 model": True,
    "--api_server_count 3": True,
    "-asc 2": True,
    "--api-server-count 1": False,
    "--api-server-count 2 --api-server-count 1": False,
    "--api-server-count": False,
    "--api-server-count many": False,
    "--image-workers 2": False,
}


@pytest.mark.parametrize("words", WORDS)
def test_several_front_ends_are_asked_for(words: str) -> None:
    assert front_ends.asked_for(words.split()) == WORDS[words]


def test_a_file_of_flags_may_ask_for_them(tmp_path: Path) -> None:
    config = tmp_path / "flags.yaml"
    for text, found in (
        ("model: x\napi-server-count: 2\n", True),
        ('"api_server_count": "4"', True),
        ("api-server-count: 1", False),
        ("# api-server-count: 2", False),
        ("port: 2", False),
    ):
        config.write_text(text)
        assert front_ends.asked_for(["--config", str(config)]) == found
    config.write_text("api-server-count: 2")
    assert not front_ends.asked_for(["--config", "absent.yaml"])
    for words in (["--api-server-count", "1"], ["-asc=1"]):  # vLLM prefers the command line
        assert not front_ends.asked_for([*words, "--config", str(config)])
        assert not front_ends.asked_for(["--config", str(config), *words])
    assert not front_ends.asked_for([f"--config={config}"]), "vLLM does not read it"


def front_end(folder: Path, index: int, count: int) -> FrontEnd:
    """One whose sockets are closed."""
    listening, (ours, theirs) = socket.socket(), Link.pair()
    for each in (listening, ours, theirs):
        each.close()
    return FrontEnd(
        index=index,
        count=count,
        folder=folder,
        listening=listening,
        engines=Engines("http://127.0.0.1:1", None, None, -1),
        loads=front_ends.shared_numbers(count),
        restarts=front_ends.shared_numbers(count),
        usage=mmap.mmap(-1, mmap.PAGESIZE),
        link=ours,
    )


def test_the_parts_of_limits_make_the_whole(tmp_path: Path) -> None:
    whole = Settings.model_validate(
        {
            "images": {"image_workers": 7, "max_image_bytes": 1000},
            "admission": {"max_running_requests": 2, "max_waiting_requests": 10},
            "http": {"fetch_cache_gb": 3.0},
        }
    )
    parts = [shares.part_of(whole, front_end(tmp_path, index, 3)) for index in range(3)]
    assert [part.images.image_workers for part in parts] == [3, 2, 2]
    assert [part.images.max_image_bytes for part in parts] == [1000] * 3
    assert [part.admission.max_waiting_requests for part in parts] == [4, 3, 3]
    assert [part.admission.max_running_requests for part in parts] == [1, 1, 1]
    assert [part.admission.max_running_image_tokens for part in parts] == [None] * 3
    assert [part.http.fetch_cache_gb for part in parts] == [1.0] * 3
    assert whole.images.image_workers == 7


def test_each_limit_that_is_divided_is_a_setting() -> None:
    names = {name for _, name, _ in shares.leaves()}
    assert names >= shares._COUNTS | shares._GIB


# ---------------------------------------------------------------------- limits of keys


def usages(memory: mmap.mmap, folder: Path, count: int = 2) -> list[SharedUsages]:
    return [SharedUsages(memory, folder / "lock", index, count) for index in range(count)]


def test_limits_are_counted_together(tmp_path: Path) -> None:
    limits = Limits(requests_per_minute=3, concurrency=2)
    one, other = (
        Usage(limits, each.cells("key")) for each in usages(mmap.mmap(-1, 1 << 16), tmp_path)
    )
    for usage in (one, other):
        usage.check()
        usage.begin()
    assert one.active == other.active == 2
    with pytest.raises(RateLimited, match="at the same time"):
        other.check()
    one.end(0, 0)
    other.check()
    other.begin()
    other.end(0, 0)
    with pytest.raises(RateLimited, match="3 requests per minute"):
        one.check()


@pytest.mark.parametrize("is_only", [True, False])
def test_a_limit_that_is_set_again_begins_full(tmp_path: Path, is_only: bool) -> None:
    limits = Limits(requests_per_minute=1)
    cells = None if is_only else usages(mmap.mmap(-1, 1 << 16), tmp_path)[0].cells("key")
    usage = Usage(limits, cells)
    usage.begin()
    with pytest.raises(RateLimited):
        usage.check()
    usage.change(Limits())
    usage.change(limits)
    usage.check()


def test_limits_of_several_names_are_apart(tmp_path: Path) -> None:
    one, other = usages(mmap.mmap(-1, 1 << 16), tmp_path)
    names = [f"key {number}" for number in range(200)]
    for number, name in enumerate(names):
        one.cells(name).active[0] = number
    assert [sum(other.cells(name).active) for name in names] == list(range(200))


def test_a_limit_without_room_is_counted_alone(tmp_path: Path) -> None:
    one, other = usages(mmap.mmap(-1, mmap.PAGESIZE), tmp_path)
    names = [f"key {number}" for number in range(400)]
    for name in names:
        usage = Usage(Limits(concurrency=1), one.cells(name))
        usage.begin()
        assert usage.active == 1
    shared = sum(sum(other.cells(name).active) for name in names)
    assert 0 < shared < len(names)


def test_requests_of_one_that_was_killed_are_forgotten(tmp_path: Path) -> None:
    memory = mmap.mmap(-1, 1 << 16)
    one, other = usages(memory, tmp_path)
    Usage(Limits(concurrency=5), one.cells("key")).begin()
    Usage(Limits(concurrency=5), other.cells("key")).begin()
    usages(memory, tmp_path)[0].forget_mine()
    assert list(other.cells("key").active) == [0, 1]


COUNTING = """
import mmap, sys
from pathlib import Path
from server.request.limits import Limits, Usage
from server.request.shared_usage import SharedUsages
fd, lock, mine = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
shared = SharedUsages(mmap.mmap(fd, 1 << 20), lock, mine, 4)
for number in range(500):
    Usage(Limits(concurrency=5), shared.cells(f"key {number}")).begin()
"""


def test_processes_take_the_same_slots(tmp_path: Path) -> None:
    fd = os.memfd_create("usage")
    os.ftruncate(fd, 1 << 20)
    command = [sys.executable, "-c", COUNTING, str(fd), str(tmp_path / "lock")]
    running = [subprocess.Popen([*command, str(mine)], pass_fds=[fd]) for mine in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    shared = SharedUsages(mmap.mmap(fd, 1 << 20), tmp_path / "lock", 0, 4)
    found = [list(shared.cells(f"key {number}").active) for number in range(500)]
    assert found == [[1, 1, 1, 1]] * 500
    os.close(fd)


# ---------------------------------------------------------------------- supervisor

# Two front ends that do nothing. The second one is killed while it has requests; when it is started
# again, it ends the server.
SUPERVISED = """
import os, signal, socket, sys, time
from pathlib import Path
from server.front_ends import usage_lock
from server.request.shared_usage import SharedUsages
from server.supervisor import Supervisor

def engines(folder, link):
    alive, dead = os.pipe()
    message = {"address": "", "count": 2, "stats": None, "image_work": None, "stall_s": 4.0}
    with socket.socket() as listening:
        link.send(message, [listening.fileno(), alive])
    link.receive()
    return 0

def front_end(mine):
    active = SharedUsages(mine.usage, usage_lock(mine.folder), mine.index, 2).cells("key").active
    is_again = mine.restarts[mine.index] > 0
    if is_again:
        print(list(active), flush=True)
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
    active[mine.index] = 3 + mine.index
    mine.link.send({"hello": []})
    if mine.index == 0:
        assert mine.link.receive()[0] == {"do": "announce"}
        mine.peer_socket(0).touch()
    else:
        while not mine.peer_socket(0).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    while (do := mine.link.receive()[0]) != {"do": "drain"}:
        assert do == {"do": "answer"}
        mine.link.send({"alive": True})
    return 0

sys.exit(Supervisor(engines, front_end, Path(sys.argv[1]), lambda _: None).run())
"""


def test_requests_of_one_that_was_killed_are_forgotten_before_it_is_back(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, "[3, 0]\n"), ended.stderr
    assert "front end 1 has ended with signal 9; starting it again" in ended.stderr


# The second one hangs; when it is started again, it fails, and when it is started once more, too.
FAILING = """
def front_end(mine):
    before = mine.restarts[mine.index]
    if before == 2:
        return 1
    mine.link.send({"hello": []})
    while True:
        do = mine.link.receive()[0]["do"]
        if do == "announce":
            mine.peer_socket(0).touch()
        elif do == "answer":
            if mine.index == 1 and mine.peer_socket(0).exists():
                if before == 1:
                    return 1
                signal.raise_signal(signal.SIGSTOP)
            mine.link.send({"alive": True})
        else:
            return 0
"""


def test_one_that_hangs_or_fails_is_started_again_unless_it_fails_at_its_start(
    tmp_path: Path,
) -> None:
    before, after = SUPERVISED.index("def front_end"), SUPERVISED.index("sys.exit(")
    program = SUPERVISED[:before] + FAILING + SUPERVISED[after:]
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines() == [
        "front end 1 has not answered for 4 s; killing it",
        "front end 1 has ended with signal 9; starting it again",
        "front end 1 has ended with status 1; starting it again",
    ]


# ---------------------------------------------------------------------- metrics


SANDBOX = "saccade_image_worker_sandbox"


def page(generation: int, updated: float, counted: float, gauges: float) -> merged.Page:
    """What a front end says that has counted so much."""
    registry = CollectorRegistry()
    Counter("requests_total", "Requests.", ["outcome"], registry=registry).labels("answered").inc(
        counted
    )
    Histogram("seconds", "Time.", buckets=(1, 2), registry=registry).observe(1.5)
    for name in ("saccade_waiting", "saccade_ready", "saccade_devices", SANDBOX):
        Gauge(name, "A number.", registry=registry).set(gauges)
    Gauge("vllm:running", "Of the engine.", ["engine"], registry=registry).labels("0").set(gauges)
    return merged.Page(generation, {"0": updated}, merged.families(registry.collect()))


def shown(pages: list[merged.Page]) -> dict[str, float]:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(merged.Whole(pages, len(pages), 0))
    return {
        sample.name + sample.labels.get("le", ""): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_metrics_are_joined_by_what_they_mean() -> None:
    found = shown([page(0, 5.0, counted=2, gauges=1), page(0, 3.0, counted=3, gauges=4)])
    assert found["requests_total"] == 5
    assert found["seconds_count"] == 2
    assert (found["seconds_bucket1.0"], found["seconds_bucket2.0"]) == (0, 2)
    assert found["seconds_sum"] == 3
    assert found["saccade_waiting"] == 5
    assert found["saccade_ready"] == 1
    assert found[SANDBOX] == 1
    assert found["saccade_devices"] == 4
    assert found["vllm:running"] == 1, "the first one has the engine's last report"
    assert found["saccade_front_ends"] == 2


def test_what_was_counted_does_not_fall() -> None:
    past = merged.Past()
    one = page(0, 1.0, counted=10, gauges=1)
    assert shown(past.with_known({0: one, 1: page(0, 1.0, 20, 2)}))["requests_total"] == 30
    silent = shown(past.with_known({0: one}))
    assert (silent["requests_total"], silent["saccade_waiting"]) == (30, 1)
    again = shown(past.with_known({0: one, 1: page(1, 2.0, 5, 3)}))
    assert (again["requests_total"], again["saccade_waiting"]) == (35, 4)
    assert shown(past.with_known({0: one, 1: page(1, 2.0, 6, 3)}))["requests_total"] == 36


# ---------------------------------------------------------------------- files


def test_files_are_read_beside_their_store(tmp_path: Path) -> None:
    asyncio.run(_read_beside(tmp_path))


async def _read_beside(folder: Path) -> None:
    reader = FileReader(folder)
    async with FileStore(folder, Quota(), Quota(), None) as store:
        file = await store.put("a", b"content", "name.png", "vision", 3600)
        assert reader.get("a", file.id) == file
        assert reader.read("a", file.id, 100) == b"content"
        with pytest.raises(ImageTooLarge):
            reader.read("a", file.id, 6)
        for group, file_id in (("b", file.id), ("a", "file-" + "0" * 32), ("a", "../../lock")):
            with pytest.raises(UnknownFile):
                reader.get(group, file_id)
        with pytest.raises(UnknownFile):
            FileReader(folder, _Later()).get("a", file.id)
        await store.delete("a", file.id)
        with pytest.raises(UnknownFile):
            reader.read("a", file.id, 100)


class _Later:
    """A clock that is two hours fast."""

    def time(self) -> float:
        return time.time() + 7200

    def monotonic(self) -> float:
        return time.monotonic() + 7200

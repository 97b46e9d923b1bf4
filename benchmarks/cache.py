"""The benchmark of the embedding cache: encoder runs and waiting times, against plain vLLM.

    python -m benchmarks.cache --model qwen2-vl
    python -m benchmarks.cache --model qwen2-vl --faults

Many users each ask repeatedly about one picture; the model's encoder is real. README.md in this
folder explains what is measured and how to read it.
"""

import argparse
import datetime
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from benchmarks import cache_report, environment
from benchmarks.cache_report import Row
from benchmarks.cache_servers import (
    PICTURE_TOKENS,
    Common,
    Replica,
    Setup,
    picture_side,
    replicas,
)
from benchmarks.chats import ChatBodies, Chats
from benchmarks.load import Plan
from benchmarks.measure import generate
from benchmarks.processes import ServerFailed
from benchmarks.redis_server import redis_server
from server.settings import GIB

_ROOT = Path(__file__).resolve().parent.parent
_REQUEST_TIMEOUT = 120.0
_DRIVE_LIMIT = 1800.0
# Questions to every server before it is measured: more pictures than the smallest GPU tier holds.
_PROBE_USERS, _PROBE_TURNS = 4, 2
_MOST_DIFFERENCE = 0.01
# When Redis fails: seconds after the second half begins.
_FAULT_DELAY = 1.0
_FEWEST_ON_HOST = 6
_ITEM_BYTES = 4  # float32
_PLAIN = Setup("plain", plain=True)
_HOST = ("--embedding-cache-gb", "1")
_NO_REDIS = "no-redis"
_OFF = Setup("off", ("--embedding-cache-gb", "0"))


def main() -> int:
    """Run the benchmark; return 1 if a check failed."""
    options = _parse()
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        benchmark = _Benchmark(options, Path(folder))
        try:
            if options.faults:
                benchmark.faults()
            else:
                for ratio in options.ratios:
                    benchmark.working_set(ratio)
        except (ServerFailed, subprocess.SubprocessError, OSError) as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    print(f"results: {options.output}")
    return int(bool(benchmark.problems))


class _Benchmark:
    """Drives the servers of a session one after the other, and collects the measurements."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._model = _model(options.model, folder)
        self._picture_side = picture_side(_ROOT / self._model)
        self._bodies = ChatBodies(folder, self._picture_side)
        self._description = environment.describe()
        self._commands: dict[str, str] = {}
        self._rows: list[Row] = []
        self._differences: dict[str, dict[str, float]] = {}
        self.problems: list[str] = []

    def working_set(self, ratio: float) -> None:
        """Compare the configurations with a working set of `ratio` times the GPU tier."""
        options, common = self._options, self._common(ratio)
        section = f"working set {ratio:g} x GPU tier of {common.gpu_tokens} tokens"
        rounds = [self._bodies.chats(options.users, options.turns) for _ in range(options.rounds)]
        probe = self._probe(section, common)

        def session(*setups: Setup, chats: Sequence[Chats] = rounds) -> None:
            with self._running(setups, common) as running:
                for replica in running:
                    probe(replica)
                for number, each in enumerate(chats):
                    for replica in reversed(running) if number % 2 else running:
                        self._drive(replica, each, section)

        session(_PLAIN, Setup("host", _HOST))
        if ratio == min(options.ratios):  # the cost of the cache where it cannot help
            session(_OFF)
        if ratio == max(options.ratios):
            with redis_server() as redis:
                disk = Setup("disk", (*self._small_host(), *self._disk("disk")))
                shared = Setup("shared", (*self._small_host(), *_redis(redis.url(0))))
                everything = (*_HOST, *self._disk("all"), *_redis(redis.url(1)))
                session(disk, shared)
                session(Setup("all", everything))
                copies = replace(disk, name="disk-again"), replace(shared, name="shared-again")
                session(*copies, chats=[Chats(chats.turns[:1]) for chats in rounds])
        self._conclude(section)

    def faults(self) -> None:
        """Measure how a shared store that hangs or is gone affects requests."""
        options, common = self._options, self._common(max(self._options.ratios))
        chats, middle = self._bodies.chats(options.users, options.turns), options.turns // 2
        first, second = Chats(chats.turns[:middle]), Chats(chats.turns[middle:])
        up, failing = "first half, Redis is up", "second half, Redis fails"
        small, probe = self._small_host(), self._probe(up, common)

        def session(*cases: tuple[Setup, Callable[[], None] | None]) -> None:
            with self._running([setup for setup, _ in cases], common) as running:
                for replica, (_, fail) in zip(running, cases, strict=True):
                    probe(replica)
                    self._drive(replica, first, up)
                    self._drive(replica, second, failing, fail)

        with redis_server() as one, redis_server() as other:
            session(
                (Setup(_NO_REDIS, small), None),
                (Setup("redis-up", (*small, *_redis(one.url(0)))), None),
            )
            session(
                (Setup("redis-stopped", (*small, *_redis(one.url(1)))), one.freeze),
                (Setup("redis-killed", (*small, *_redis(other.url(0)))), other.kill),
            )
        for section in (up, failing):
            self._conclude(section)
        p95 = {row.server: row.ttft_p95 for row in self._rows if row.section == failing}
        for name, seconds in p95.items():
            print(f"{name}: {(seconds - p95[_NO_REDIS]) * 1e3:+.0f} ms of TTFT p95 to {_NO_REDIS}")

    @contextmanager
    def _running(self, setups: Sequence[Setup], common: Common) -> Iterator[list[Replica]]:
        for setup in setups:
            name = f"{setup.name}, GPU tier of {common.gpu_tokens} tokens"
            command = shlex.join(["python", *common.command(setup, 0)[1:]])
            self._commands[name] = command.replace(str(self._folder), "FOLDER")
        with replicas(setups, common, self._folder) as running:
            yield running

    def _probe(self, section: str, common: Common) -> Callable[[Replica], None]:
        """Return a function that warms up a server and compares its answers with the first's."""
        chats = self._bodies.chats(_PROBE_USERS, _PROBE_TURNS)
        expected: list[list[float]] = []

        def probe(replica: Replica) -> None:
            found = replica.logprobs(chats)
            expected.extend(found if not expected else [])
            pairs = zip(chain(*found), chain(*expected), strict=True)
            difference = max(abs(one - other) for one, other in pairs)
            self._differences.setdefault(section, {})[replica.setup.name] = difference
            if difference > _MOST_DIFFERENCE:
                self.problems.append(f"{section}: {replica.setup.name} gives different answers")

        return probe

    def _drive(
        self,
        replica: Replica,
        chats: Chats,
        section: str,
        fail: Callable[[], None] | None = None,
    ) -> None:
        """Measure one server; `fail` is called while requests are in progress."""
        before = replica.counters()
        plan = Plan(replica.server.port, chats.bodies, self._options.concurrency, _REQUEST_TIMEOUT)
        timer = threading.Timer(_FAULT_DELAY, fail or (lambda: None))
        timer.start()
        result = generate(plan, _DRIVE_LIMIT)
        timer.join()
        counted = replica.counters() - before
        row = Row.of(section, replica.setup.name, chats, result, counted)
        self._rows.append(row)
        if row.failures:
            self.problems.append(f"{section}: {row.server}: {row.failures} requests failed")
        if row.server.endswith("-again") and row.encoder_runs:
            self.problems.append(f"{section}: {row.server}: the encoder ran for known pictures")

    def _conclude(self, section: str) -> None:
        """Print the measurements of a section, and save all so far."""
        print(cache_report.table([row for row in self._rows if row.section == section]))
        differences = self._differences.get(section, {})
        if differences:
            print(f"  log-probabilities of the same answers: {max(differences.values()):.2g} apart")
        print(
            "".join(f"  PROBLEM: {each}\n" for each in self.problems if section in each), flush=True
        )
        content = {
            "options": {**vars(self._options), "output": self._options.output.name},
            **self._description,
            "commands": self._commands,
            "logprob_differences": self._differences,
            "problems": self.problems,
        }
        cache_report.save(self._options.output, content, self._rows)

    def _common(self, ratio: float) -> Common:
        options = self._options
        tokens = max(PICTURE_TOKENS, round(options.users * PICTURE_TOKENS / ratio))
        return Common(self._model, self._picture_side, tokens, options.engine_cores)

    def _small_host(self) -> tuple[str, ...]:
        """A host tier for a third of the pictures, so that the tiers below it are used."""
        config = json.loads((_ROOT / self._model / "config.json").read_text())
        picture = PICTURE_TOKENS * config["text_config"]["hidden_size"] * _ITEM_BYTES
        pictures = max(_FEWEST_ON_HOST, self._options.users // 3)
        return "--embedding-cache-gb", str(pictures * picture / GIB)

    def _disk(self, name: str) -> tuple[str, ...]:
        return "--embedding-cache-dir", str(self._folder / name), "--embedding-cache-disk-gb", "1"


def _redis(url: str) -> tuple[str, ...]:
    return "--embedding-cache-url", url


def _model(name: str, folder: Path) -> Path:
    if name == "demo":
        return Path("server/demo")  # servers run in the root of the repository
    from benchmarks.models import qwen2_vl  # loads torch

    return qwen2_vl(folder / name)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache",
        description="Compare the embedding cache with plain vLLM's encoder cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=("demo", "qwen2-vl"), default="demo", help="created on the fly, no stub")
    add("--users", type=_positive, default=30, help="pictures per round")
    add("--turns", type=_positive, default=8, help="requests about each picture")
    add("--rounds", type=_positive, default=2, help="each with pictures of its own")
    add("--concurrency", type=_positive, default=4, help="requests in flight")
    add("--ratios", type=_numbers, default="0.5,2,10", help="working sets, in GPU tiers")
    add("--engine-cores", help="cores for the model's threads of every server, such as 1 or 2-3")
    add("--faults", action="store_true", help="instead, make Redis hang and die at the last ratio")
    add("--output", type=Path, help="result file; default: benchmarks/results/<date>-<name>")
    options = parser.parse_args()
    if options.faults and options.turns < 2:
        parser.error("--faults needs at least two turns")
    if options.output is None:
        name = f"cache-{options.model}{'-faults' if options.faults else ''}"
        stem = f"{datetime.date.today().isoformat()}-{name}"
        options.output = _ROOT / "benchmarks" / "results" / f"{stem}.json"
    return options


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _end(number: int, _frame: object) -> None:
    """Raise an exception, so that the servers are ended."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

"""Fixtures: the real server with the embedded model, clients for it, a real image origin."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import hypothesis
import psutil
import pytest

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

from tests.starts import ENGINES, Started, template

# Before anything imports vLLM or transformers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _TorchvisionHook(importlib.abc.MetaPathFinder):
    """Lets torchvision work beside a CPU torch before a test imports what would import it.

    Doing so at once would import torch for every test.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> None:
        if fullname in ("transformers", "vllm"):
            from server.engine.vllm_adapter import plugin

            plugin.make_torchvision_importable()


sys.meta_path.insert(0, _TorchvisionHook())

hypothesis.settings.register_profile("unhurried", deadline=None)  # machines are noisy
hypothesis.settings.load_profile("unhurried")

START_TIMEOUT_S = 240
# Fixtures of servers that several files share.
SHARED = ("server", "guarded", "tight")
# The group of files whose tests run several engines: two such files at once would need more memory
# than a small machine has.
SEVERAL_ENGINES = "several engines"
# Groups of tests that take longest. They run first, so that all processes of pytest end together.
FIRST = (
    SEVERAL_ENGINES,
    "server",
    *("tests/server/test_demo_training.py", "tests/server/test_parity.py", "guarded"),
    *("tests/server/test_lifecycle.py", "tests/server/test_vllm_processes.py", "tight"),
    "tests/deploy/test_rolling_restart.py",
)
# Connections last longer than clients keep them: else one ends just when its client sends again.
OF_SERVERS = {
    "SACCADE_IMAGE_WORKERS": "2",
    "SACCADE_DRAIN_DELAY_S": "0",
    "SACCADE_FILES": "false",  # several servers would use the folder in the user's cache
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
}
STOP_TIMEOUT_S = 90  # above the 30 s in which running requests may end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=150,
        help="random bodies that the main server gets; above the default, other ones each time",
    )

    parser.addoption(
        "--screenshots",
        type=Path,
        help="folder for pictures of the playground, such as /tmp/pictures",
    )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that share a server next to each other, those that end it last.

    With `--dist loadgroup`, one process of pytest runs all tests of a group.
    """
    groups = {item: _group(item) for item in items}
    ends = Counter(group for item, group in groups.items() if _ends_server(item))
    if twice := [group for group in SHARED if ends[group] > 1]:
        raise pytest.UsageError(f"several tests end a server: {', '.join(twice)}")
    places = {group: n for n, group in enumerate(dict.fromkeys((*FIRST, *groups.values())))}

    files = {path: n for n, path in enumerate(dict.fromkeys(item.path for item in items))}

    def key(item: pytest.Item) -> tuple[int, int, bool]:
        # A file of a group that shares no server has a server of its own.
        file = 0 if groups[item] in SHARED else files[item.path]
        return places[groups[item]], file, _ends_server(item)

    items.sort(key=key)
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))


def _ends_server(item: pytest.Item) -> bool:
    return item.get_closest_marker("ends_server") is not None


def _group(item: pytest.Item) -> str:
    """What the test is marked with, or else the server that it shares, or its file."""
    if (marker := item.get_closest_marker("group")) is not None:
        return str(marker.args[0])
    fixtures = getattr(item, "fixturenames", ())
    shared = [name for name in SHARED if name in fixtures]
    if len(shared) > 1:
        raise pytest.UsageError(f"{item.nodeid} shares two servers: {', '.join(shared)}")
    return shared[0] if shared else item.nodeid.partition("::")[0]


@dataclass
class Server:
    """`saccade serve` as a process of its own."""

    process: Started | subprocess.Popen[bytes]
    log: list[str]
    url: str = ""
    model: str = "saccade-tiny"

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def named(self, name: str) -> list[psutil.Process]:
        """The processes below it whose command lines contain `name`."""
        return [child for child in self.children() if name in command_line(child)]

    def image_workers(self) -> list[psutil.Process]:
        return self.named("ImageWorker")

    @contextlib.contextmanager
    def engine_held(self) -> Iterator[None]:
        """The engine's processes do nothing meanwhile, and leave the cores to the others."""
        processes = self.named("VLLM::")
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)


def assert_nothing_is_left(children: list[psutil.Process]) -> None:
    """All processes of a server that has ended are over, or soon will be."""
    _, alive = psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
    assert [child.cmdline() for child in alive] == []


def command_line(process: psutil.Process) -> str:
    """Empty if it is over."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@contextlib.contextmanager
def serving(
    *flags: str,
    executed: bool = False,
    disks: Mapping[str, int] | None = None,
    log_file: Path | None = None,
    **environment: str,
) -> Iterator[Server]:
    """Start `saccade serve FLAGS` on a free port; end it, whatever happens.

    It is a fork of a process that has imported the server, unless it has to be `executed`. A fork
    may have `disks` of its own (`tests.small_disks.mount`). Its log is a pipe, or `log_file`.
    """
    words = ("serve", "--host", "127.0.0.1", "--port", "0", *flags)
    ended = threading.Event()
    if log_file is None:
        reader, writer = os.pipe()
        ended.set()  # a pipe tells its reader when the server has ended
    else:
        writer = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        reader = os.open(log_file, os.O_RDONLY)
    try:
        start = _execute if executed else functools.partial(_fork, disks)
        process = start(words, {**os.environ, **OF_SERVERS, **environment}, writer)
    finally:
        os.close(writer)
    server = Server(process, [])
    reading = threading.Thread(target=_read, args=(reader, server.log, ended), daemon=True)
    reading.start()
    try:
        _await_ready(server)
        yield server
    finally:
        left = server.children() if process.poll() is None else []
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        ended.set()
        reading.join(STOP_TIMEOUT_S)


def _execute(words: Sequence[str], env: dict[str, str], output: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server", *words]
    return subprocess.Popen(
        command, env=env | ENGINES, stdout=output, stderr=output, start_new_session=True
    )


def _fork(
    disks: Mapping[str, int] | None, words: Sequence[str], env: dict[str, str], output: int
) -> Started:
    target = "tests.starts:saccade"
    if disks is not None:
        target, words = "tests.small_disks:saccade", (json.dumps(disks), *words)
    return template().start(target, *words, env=env, output=output, errors=output)


def _read(descriptor: int, log: list[str], ended: threading.Event) -> None:
    """Append lines to `log`, until the end of the file after `ended` is set."""
    with os.fdopen(descriptor, errors="replace") as lines:
        while True:
            is_last = ended.is_set()
            for line in lines:
                log.append(line)  # noqa: PERF402 - tests read the log meanwhile
            if is_last:
                return
            time.sleep(0.05)


def _await_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for line in server.log:
            if match := re.search(r"ready: .* on (https?://\S+|unix:\S+)", line):
                server.url = match[1]
                return
        if server.process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError("the server did not come up:\n" + "".join(server.log[-60:]))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate for 127.0.0.1, `cert.pem`, and its key, `key.pem`."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(
        ["openssl", "req", *kind, "-keyout", key, "-out", cert, "-days", "2", *subject],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the embedded model for the whole session."""
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    files = ("--files", "--files-dir", str(tmp_path_factory.mktemp("files")))
    embeddings = ("--embedding-cache-dir", str(tmp_path_factory.mktemp("embeddings")))
    site = ("--allowed-origins", '["*"]')  # pages of other sites may use it
    flags = ("--max-model-len", "4096", "--allow-private-media", *tools, *files, *embeddings, *site)
    with serving(*flags) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


@pytest.fixture
def async_client(server: Server) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@dataclass
class Origin:
    """A web server with images: `files` by path; `requests` are the paths asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    delay_s: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def origin() -> Iterator[Origin]:
    origin = Origin()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            origin.requests.append(self.path)
            time.sleep(origin.delay_s.get(self.path, 0))
            data = origin.files.get(self.path)
            with contextlib.suppress(ConnectionError):
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        origin.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield origin
        server.shutdown()


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[1]

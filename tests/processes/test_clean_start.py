"""The server starts as a program without secrets, and image workers come from a fork of that.

`restart` replaces its process, so each test starts one, which goes on with `tests.clean_program`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.clean_start import interpreter_options
from server.workers import environment, template
from tests.forked import in_fork
from tests.process_memory import memory_with
from tests.processes.test_forkserver import has_ended

VARIABLES = {
    "VLLM_API_KEY": "sk-of-vllm-2e91",
    "HF_TOKEN": "hf_of-the-hub-83bd",
    "SACCADE_ADMIN_KEY": "sk-of-admin-66f1",
    "SACCADE_EMBEDDING_CACHE_URL": "redis://user:redis-password-1d5c@cache:6379/0",
    "AWS_SECRET_ACCESS_KEY": "of-aws-f922",
    "ANY_OTHER": "value-of-any-other-7c3e",
    "HF_TOKEN_PATH": "/some/where/token",
}
NAMES = ["VLLM_API_KEY", "HF_TOKEN", "SACCADE_ADMIN_KEY", "AWS_SECRET_ACCESS_KEY", "ANY_OTHER"]
FLAG = "sk-of-a-flag-c7d9"
MARKS = [FLAG, "redis-password-1d5c", *(VARIABLES[name] for name in NAMES)]
WORDS = ["model", "--api-key", FLAG, "--port", "0"]
OPTIONS = ["-uW", "ignore", "-Xint_max_str_digits=9000", "-X", "no_debug_ranges"]
PROGRAM = "from tests.clean_program import start; start()"


class Server:
    """The process of a test."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.told = self._line()

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def worker(self) -> tuple[psutil.Process, psutil.Process]:
        """A forkserver and its worker."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        forkserver, worker = map(psutil.Process, self._line())
        return forkserver, worker


@contextlib.contextmanager
def running() -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, *OPTIONS, "-c", PROGRAM, *WORDS],
        env=os.environ | VARIABLES,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Server(process)
        finally:
            process.kill()


def test_no_process_of_the_workers_has_a_secret_and_the_server_has_all() -> None:
    with running() as server:
        forkserver, worker = server.worker()
        parent = forkserver.parent()
        assert parent is not None
        assert parent.ppid() == server.process.pid
        assert worker.ppid() == forkserver.pid
        for process in (parent, forkserver, worker):
            assert set(memory_with(process.pid, MARKS)) == set()
            assert not set(VARIABLES) - {"HF_TOKEN_PATH"} & set(process.environ())
            files = [os.readlink(each) for each in _files(process.pid)]
            assert not [each for each in files if "saccade-start" in each]
        assert set(memory_with(server.process.pid, MARKS)) == set(MARKS)


def _files(pid: int) -> list[str]:
    return [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]


def test_the_server_gets_its_variables_and_flags_back() -> None:
    with running() as server:
        started, command, words, argv, before, after, blocked, *python = server.told
        assert (started, command, words) == (1.5, "serve", WORDS)
        assert argv == ["-c", *WORDS]
        assert not (set(VARIABLES) - {"HF_TOKEN_PATH"}) & set(before)
        assert after == os.environ | VARIABLES | {"SET_BEFORE": "1"}
        assert blocked == 0
        assert python == [{"int_max_str_digits": "9000", "no_debug_ranges": True}, True]
        title = psutil.Process(server.process.pid).cmdline()[0]
        assert title.endswith("model --api-key '***' --port 0")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("-m server serve -u", ""),
        ("/usr/bin/saccade serve -B", ""),
        ("-u -B saccade serve", "-u -B"),
        ("-uBm server serve", "-uB"),
        ("-uBmserver serve", "-uB"),
        ("-ixOO saccade", "-OO"),
        ("-i saccade", ""),
        ("-Wignore -W error -uWdefault saccade", "-W ignore -W error -u -W default"),
        ("-Xdev -X importtime -c program", "-X dev -X importtime"),
        ("--check-hash-based-pycs never -I saccade", "--check-hash-based-pycs never -I"),
        ("-u - words", "-u"),
        ("", ""),
    ],
)
def test_pythons_own_options_are_told_from_those_of_the_program(words: str, options: str) -> None:
    assert interpreter_options(["python", *words.split()]) == options.split()


def test_a_forkserver_is_replaced_by_the_template_and_without_one_executed() -> None:
    with running() as server:
        first, worker = server.worker()
        above = first.parent()
        assert above is not None
        first.kill()
        assert has_ended(worker)
        second, _ = server.worker()
        assert second.ppid() == above.pid
        above.kill()
        assert has_ended(second)
        third, last = server.worker()
        assert third.ppid() == server.process.pid
        server.process.kill()
        assert has_ended(third)
        assert has_ended(last)


def test_the_template_ends_with_a_killed_server() -> None:
    with running() as server:
        forkserver, worker = server.worker()
        above = forkserver.parent()
        assert above is not None
        server.process.kill()
        for each in (above, forkserver, worker):
            assert has_ended(each)


def test_a_template_that_cannot_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control, _ = socket.socketpair()
    monkeypatch.setattr(template, "_template", ours)
    monkeypatch.setattr(template, "_ANSWER_TIMEOUT_S", 0.1)
    with ours, theirs, control, _:
        assert template.start(None, control) is None


def test_a_forkserver_that_comes_too_late_is_killed() -> None:
    def forkservers() -> list[int]:
        template.prepare()
        (above,) = psutil.Process().children()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        above.suspend()
        template._ANSWER_TIMEOUT_S = 0.1
        assert template.start(None, theirs) is None
        above.resume()
        template._ANSWER_TIMEOUT_S = 30.0
        second = template.start(None, theirs)
        assert second is not None
        late = [each for each in above.children() if each.pid != second.pid]
        left = [each.pid for each in late if not has_ended(each)]
        ours.close()
        return left

    assert in_fork(forkservers) == []


def test_a_fork_for_untrusted_files_does_not_read_the_token_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored")

    def token() -> list[str | None]:
        from huggingface_hub import constants, get_token

        constants.HF_TOKEN_PATH = str(tmp_path / "token")
        found = [get_token()]
        environment.become_without_secrets(environment.without_secrets({"HF_TOKEN": "hf_given"}))
        return [*found, get_token(), os.environ.get("HF_TOKEN")]

    assert in_fork(token) == ["hf_stored", None, None]


@pytest.mark.parametrize(
    "variables",
    [{"HF_ENDPOINT": "https://user:password@mirror"}, {"VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "5"}],
)
def test_variables_that_imports_may_read_are_not_withheld(variables: dict[str, str]) -> None:
    assert environment.for_imports({"PATH": "/bin", **variables}) is None


def test_what_imports_read_is_there_without_secrets() -> None:
    read = {
        "SSL_CERT_FILE": "/etc/own-ca.pem",
        "OPENSSL_CONF": "/etc/fips.cnf",
        "HUGGINGFACE_HUB_CACHE": "/models",
        "DO_NOT_TRACK": "1",
        "PROMETHEUS_DISABLE_CREATED_SERIES": "true",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "8",
    }
    secret = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=a",
        "RAY_REDIS_PASSWORD": "b",
        "PROMETHEUS_URL": "http://user:c@host",
    }
    assert environment.for_imports(read | secret) == read


# A thread that is not in the next program, such as an agent's.
WITH_A_THREAD = """
import threading
from server import clean_start

threading.Thread(target=threading.Event().wait, daemon=True).start()
clean_start.restart("serve", ["--no-such-flag"], 0.0)
print("goes on")
"""


def test_a_process_in_which_something_else_runs_is_not_replaced() -> None:
    command = [sys.executable, "-c", WITH_A_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "goes on\n"


def test_secrets_that_no_import_reads_are_withheld() -> None:
    given = {"PATH": "/bin", "VLLM_API_KEY": "a", "HF_TOKEN": "b", "OTHER": "c"}
    assert environment.for_imports(given) == {"PATH": "/bin"}

"""The command line, as far as it needs no engine."""

import re
import subprocess
import sys

import pytest

# A stop that hits a start-up in the middle of starting a thread of a pool.
INTERRUPTED_START = """
import atexit
import threading

from server import cli

def run(argv, progress, command):
    atexit.register(print, "cleaned up")
    threading.Thread(target=threading.Event().wait).start()
    raise cli._Interrupted

cli._run = run
cli.main(["serve"])
"""


def test_an_interrupted_start_does_not_wait_for_threads() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_START], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 130
    assert ended.stdout == "cleaned up\n"
    assert "stopped during start-up" in ended.stderr


def test_a_signal_while_the_server_becomes_another_program_stops_the_start() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        assert "loading vLLM" in process.stderr.readline()
        process.terminate()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "stopped during start-up" in errors
    assert process.returncode == 130


OPENS_A_FILE = """
import os, sys
from server import cli

cli._open_standard_files()
file = os.open("/", os.O_RDONLY)
print("lost", file=sys.stderr)
print(file > 2)
for fd in (0, 2):
    print(os.readlink(f"/proc/self/fd/{fd}"), os.get_inheritable(fd))
"""


def test_standard_files_that_are_closed_are_opened() -> None:
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, OPENS_A_FILE]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "True\n/dev/null True\n/dev/null True\n"


# What a command line imports: {words: modules that would make it slow}.
LIGHT = {
    "--version": "typer|pydantic|httpx|vllm|torch",
    "--help": "rich|pydantic|httpx|vllm|torch",
    "serve --help": "typer|httpx|vllm|torch|transformers",
}


@pytest.mark.parametrize("words", LIGHT)
def test_help_imports_little(words: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "server", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = {name.split(".")[0] for name in re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE)}
    assert "server" in imported
    assert not imported & set(LIGHT[words].split("|"))


def test_help_lists_the_commands_of_server_and_client() -> None:
    command = [sys.executable, "-m", "server", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for name in ("serve", "demo", "ask", "chat", "batch", "tokens", "models", "top"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)

"""System programs that tests run: prometheus, nginx, haproxy, systemd-analyze, chromium."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import which

import httpx
import pytest

# The folder that deploy/test_services.sh fills.
DIRECTORY = Path(__file__).parents[1] / ".venv" / "services"

_SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not in every user's PATH
_START_TIMEOUT_S = 240
_STOP_TIMEOUT_S = 30


def program(name: str) -> Path:
    """The path of the program `name`.

    If it is missing, the test is skipped, or fails with SERVICES=required.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SYSTEM_DIRECTORIES))
    found = which(name, path=str(DIRECTORY / "bin")) or which(name, path=path)
    if found is None:
        miss = pytest.fail if os.environ.get("SERVICES") == "required" else pytest.skip
        miss(f"{name} is not here: `make test` gets it")
    return Path(found)


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    *,
    ready: Callable[[], bool],
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Run `command` from when `ready()` is true to the end of the block; it gets a SIGTERM then.

    `env` is the whole environment, by default that of the tests, and `log` a file for its output.
    `ready` is called repeatedly; it returns False, or raises an OSError or httpx.TransportError,
    until the program listens.

    Raises:
        RuntimeError: the program ended, or was not ready in time; the message contains its output.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace")
        if log is None
        else log.open("w+", errors="replace")
    ) as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            if not _becomes_ready(process, ready):
                output.seek(0)
                raise RuntimeError(f"{command[0]} did not come up:\n{output.read()[-10_000:]}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _becomes_ready(process: subprocess.Popen[str], ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, httpx.TransportError):
            if ready():
                return True
        time.sleep(0.05)
    return False

"""The forkserver when it is killed or stopped, and processes whose parent ends early."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from server.workers import forkserver as forkservers
from server.workers.forkserver import Forkserver, ForkserverLost
from server.workers.process import die_with_parent

WAIT = "tests.processes.test_forkserver:wait"


def wait(fds: list[int]) -> None:
    """What the forked processes of these tests do."""
    time.sleep(600)


@pytest.fixture
def forkserver() -> Iterator[Forkserver]:
    started = Forkserver(None)
    yield started
    started.close()


def pid_of(forkserver: Forkserver) -> int:
    assert forkserver._process is not None
    return forkserver._process.pid


def has_ended(process: psutil.Process) -> bool:
    """Wait until `process` has ended, with its forkserver."""
    for _ in range(600):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_forkserver_that_was_killed_or_hangs_is_replaced_by_the_next_start(
    forkserver: Forkserver, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkservers, "_FORK_TIMEOUT_S", 0.5)
    first = forkserver.fork(WAIT, [])
    child, before = psutil.Process(first.pid), pid_of(forkserver)
    os.kill(before, number)
    second = forkserver.fork(WAIT, [])
    assert pid_of(forkserver) != before
    assert not psutil.pid_exists(before)
    assert has_ended(child)
    assert psutil.pid_exists(second.pid)
    for process in (first, second):
        process.end()


def test_a_closed_forkserver_ends_a_start_that_waits_and_is_not_replaced(
    forkserver: Forkserver,
) -> None:
    forkserver.fork(WAIT, []).end()
    stopped = psutil.Process(pid_of(forkserver))
    stopped.suspend()
    while stopped.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    lost: list[Exception] = []

    def start() -> None:
        try:
            forkserver.fork(WAIT, []).end()
        except ForkserverLost as error:
            lost.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    while not forkserver._starting.locked():
        time.sleep(0.01)
    forkserver.close()
    starting.join(60)
    assert len(lost) == 1
    assert forkserver._process is None


def test_a_process_whose_parent_has_ended_before_it_asked_ends() -> None:
    """As a worker does whose forkserver is killed just after the fork."""
    if (pid := os.fork()) == 0:
        try:
            die_with_parent(os.getppid() + 1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


class Broken(Forkserver):
    """A forkserver that ends while it loads."""

    starts = 0

    def _execute(self, control: socket.socket) -> "subprocess.Popen[bytes]":
        self.starts += 1
        return subprocess.Popen([sys.executable, "-c", ""])


def test_a_forkserver_that_ends_while_it_loads_is_tried_once_a_start() -> None:
    broken = Broken(None)
    for starts in (1, 2):
        with pytest.raises(ForkserverLost):
            broken.fork(WAIT, [])
        assert broken.starts == starts
    broken.close()

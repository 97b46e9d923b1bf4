"""The engine core's process is forked before it is needed, and spawned if that is not possible.

`prepare` has to run on the main thread of a process without other threads, so each test runs one of
the functions below in a new process.
"""

import gc
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection
from typing import Any

import psutil
import setproctitle

from server.engine.vllm_adapter import core_fork
from server.engine.vllm_adapter.core_fork import CoreProcess

TIMEOUT_S = 60
STATUS = 7


def run(scenario: Any) -> list[dict[str, Any]]:
    """The lines that `scenario` and the processes that it starts print."""
    code = f"from tests.processes import test_core_fork as t; t.{scenario.__name__}()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def prepared() -> int | None:
    """Make the fork; returns its process id."""
    core_fork.prepare()
    fork = core_fork._waiting
    return None if fork is None else fork.pid


def core(status: int) -> None:
    """Runs as the engine core."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    setproctitle.setproctitle("CORE")
    tell(
        title=psutil.Process().cmdline()[0],
        pid=os.getpid(),
        is_child=parent.pid == os.getppid(),
        added=os.environ.get("ADDED"),
        removed=os.environ.get("REMOVED"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        collects=gc.isenabled(),
        handlers=[
            signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        ],
        blocked=len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    )
    sys.exit(status)


def start_core() -> None:
    process = CoreProcess(target=core, args=(STATUS,))
    process.start()
    process.join()
    tell(exitcode=process.exitcode, started=process.pid)


def start_twice() -> None:
    os.environ["REMOVED"] = "yes"
    signal.signal(signal.SIGTERM, lambda *_: None)
    tell(fork=prepared())
    del os.environ["REMOVED"]
    os.environ["ADDED"] = "yes"
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
    start_core()
    start_core()


def test_the_fork_runs_the_first_process_as_if_it_were_spawned() -> None:
    made, first, first_end, second, second_end = run(start_twice)
    assert first["pid"] == first_end["started"] == made["fork"]
    assert second["pid"] == second_end["started"] != made["fork"]
    assert first_end["exitcode"] == second_end["exitcode"] == STATUS
    assert first["title"] == "CORE"
    assert first["is_child"]
    assert first["added"] == "yes"
    assert first["removed"] is None
    assert first["open_files"] == [100, 200]
    assert first["collects"]
    assert {**first, "pid": 0} == {**second, "pid": 0}


def start_beside_a_thread() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    tell(fork=prepared())
    start_core()
    stop.set()


def test_a_process_with_threads_makes_no_fork() -> None:
    made, spawned, ended = run(start_beside_a_thread)
    assert made["fork"] is None
    assert spawned["is_child"]
    assert ended["exitcode"] == STATUS


def start_after_the_fork_ended() -> None:
    fork = prepared()
    assert fork is not None
    os.kill(fork, signal.SIGTERM)
    psutil.Process(fork).wait()
    tell(fork=fork)
    start_core()


def test_the_process_is_spawned_if_the_fork_has_ended() -> None:
    made, spawned, ended = run(start_after_the_fork_ended)
    assert spawned["pid"] == ended["started"] != made["fork"]
    assert ended["exitcode"] == STATUS


def send(connection: Connection) -> None:
    connection.send(os.getpid())


def start_with_a_connection() -> None:
    tell(fork=prepared())
    ours, theirs = multiprocessing.Pipe()
    process = CoreProcess(target=send, args=(theirs,))
    process.start()
    tell(pid=ours.recv())
    process.join()


def test_a_process_that_needs_open_files_is_spawned() -> None:
    made, spawned = run(start_with_a_connection)
    assert spawned["pid"] != made["fork"]
    assert not psutil.pid_exists(made["fork"])


def start_with_another_executable() -> None:
    tell(fork=prepared())
    with tempfile.NamedTemporaryFile("w", suffix=".sh", delete=False) as script:
        script.write(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    os.chmod(script.name, 0o700)
    multiprocessing.set_executable(script.name)
    start_core()
    os.unlink(script.name)


def test_a_process_with_another_executable_is_spawned() -> None:
    made, spawned, ended = run(start_with_another_executable)
    assert spawned["pid"] == ended["started"] != made["fork"]
    assert ended["exitcode"] == STATUS


def end_at_once() -> None:
    tell(fork=prepared())
    os._exit(0)


def test_the_fork_ends_with_its_parent() -> None:
    (made,) = run(end_at_once)
    try:
        psutil.Process(made["fork"]).wait(TIMEOUT_S)
    except psutil.NoSuchProcess:
        return

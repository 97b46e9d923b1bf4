"""Servers and engines that start as forks of a process which has imported the server and vLLM.

`saccade serve` imports vLLM twice: in the server and in vLLM's worker. Here these are forks of one
process, the template, which takes most of the processor time out of a start. Otherwise they are
what they are in `saccade serve`, except that the server has its environment from the start.
"""

import atexit
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path

import setproctitle

from server.engine.vllm_adapter import plugin
from server.workers import template as workers
from server.workers.forked_process import ForkedProcess
from server.workers.forkserver import Forkserver
from server.workers.forkserver_process import run
from server.workers.process import die_with_parent, import_uncollected, keep_imported

# The engines of all servers compute in one thread each. vLLM would bind them all to one core.
ENGINES = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_ROOT = Path(__file__).parents[1]
_RUN_TIMEOUT_S = 240
# What the server, its engine core, vLLM's worker and the image workers import when they start.
_MODULES = (
    "uvloop",
    "server.app",
    "server.engine.arguments",
    "server.engine.extractor",
    "server.engine.vllm_adapter.renderer",
    "vllm.model_executor.models.qwen3_vl",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
)


class Template(Forkserver):
    """Starts the template when it is first needed, and processes as its forks."""

    def __init__(self) -> None:
        super().__init__(None)

    def _execute(self, control: socket.socket) -> "subprocess.Popen[bytes]":
        program = f"from tests.starts import main; main({control.fileno()})"
        return subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[control.fileno()],
            cwd=_ROOT,
            env=os.environ | ENGINES,
            start_new_session=True,
        )

    def start(
        self,
        target: str,
        *words: str,
        output: int,
        errors: int,
        env: Mapping[str, str] = os.environ,
    ) -> "Started":
        """Start a process that calls `target`, "module:function", with `words`. Its standard output
        and error are the descriptors `output` and `errors`."""
        with os.fdopen(os.memfd_create("start"), "w+b") as file:
            file.write(json.dumps([target, words, {**env, **ENGINES}]).encode())
            file.seek(0)
            return Started(self.fork("tests.starts:begin", [file.fileno(), output, errors]))

    def run(
        self, target: str, *words: str, env: Mapping[str, str] = os.environ
    ) -> subprocess.CompletedProcess[str]:
        """As `start`, until the process has ended."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            files = {"output": output.fileno(), "errors": errors.fileno()}
            process = self.start(target, *words, **files, env=env)
            try:
                status = process.wait(_RUN_TIMEOUT_S)
            finally:
                process.kill()
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(words, status, output.read(), errors.read())


class Started:
    """A process that the template has started: the part of `Popen` that tests use."""

    def __init__(self, process: ForkedProcess) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exit_code(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._process.exit_code(-1 if timeout is None else timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def template() -> Template:
    """The template of this process, which ends with it."""
    made = Template()
    atexit.register(made.close)
    return made


# ---------------------------------------------------------------------- in the template


def main(control: int) -> None:
    """Import what servers need, and fork when asked."""
    # The first call needs the environment of the start to find the memory of the title.
    setproctitle.setproctitle("tests.starts")
    die_with_parent()
    from server import cli

    cli._quiet_libraries()
    import_uncollected()
    for name in _MODULES:
        importlib.import_module(name)
    assert "numba" not in sys.modules  # vLLM would choose other kernels
    assert threading.active_count() == 1
    keep_imported()
    run(socket.socket(fileno=control))


def begin(fds: list[int]) -> None:
    """Become the process that was asked for."""
    file, output, errors = fds
    with os.fdopen(file, "rb") as asked:
        target, words, variables = json.load(asked)
    die_with_parent()
    os.setsid()
    os.dup2(output, sys.stdout.fileno())
    os.dup2(errors, sys.stderr.fileno())
    os.close(output)
    os.close(errors)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_environment(variables)
    _fork_workers()
    module, _, name = target.partition(":")
    status = 0
    try:
        getattr(importlib.import_module(module), name)(*words)
    except SystemExit as end:
        status = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def saccade(*words: str) -> None:
    """`saccade WORDS`."""
    from server import cli

    setproctitle.setproctitle(" ".join(("saccade", *words)))
    workers.prepare()
    cli.main(list(words))


def plain_vllm(*words: str) -> None:
    """vLLM's server with the flags `words`. Only the start of its processes differs."""
    from vllm.entrypoints.launchers.api_server.entry import main

    from server.engine.vllm_adapter import core_fork, quick_start

    core_fork.prepare()
    quick_start.register()
    sys.argv[1:] = words
    main()


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # it is one of the variables


class _Worker(ForkProcess):
    """vLLM's worker. Our plugin's changes are those in the engine core, but for one."""

    def run(self) -> None:
        if plugin.asked().die_with_parent:
            plugin._die_with_parent()
        super().run()


def _fork_workers() -> None:
    """Let vLLM's executor fork its worker from the engine core."""
    from vllm.v1.executor import multiproc_executor

    from server.engine.vllm_adapter import quick_start

    context = ForkContext()
    vars(context)["Process"] = _Worker
    del quick_start._PROCESSES[multiproc_executor.__name__]
    vars(multiproc_executor)["get_mp_context"] = lambda: context

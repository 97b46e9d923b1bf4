"""The engine core as a fork of the server.

A spawned engine core imports vLLM again. The fork is made when the server has imported vLLM and
done nothing else: no other thread runs, OpenMP has no threads yet, and vLLM has neither loaded its
plugins nor read the model. It waits until vLLM starts its engine core. Then it does what a spawned
process does: it takes over the environment variables and limits of the server, unpickles the
process and runs it.
"""

import atexit
import contextlib
import io
import os
import resource
import signal
import socket
import struct
import sys
import threading
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, NoReturn

import setproctitle

from server.engine.vllm_adapter.quick_process import QuickProcess
from server.workers.process import die_with_parent

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
_LENGTH = struct.Struct("<Q")
_OPEN_FILES = resource.RLIMIT_NOFILE  # vLLM raises it before it starts its processes


class _Fork(NamedTuple):
    """A process that waits at the other end of `connection` for what it shall run."""

    pid: int
    connection: socket.socket


_waiting: _Fork | None = None


def prepare() -> None:
    """Fork the process for the engine core, unless other threads run that a fork would lack.

    Call it on the main thread: the fork ends with the thread that made it.
    """
    global _waiting
    if threading.active_count() > 1:
        return
    resource_tracker.ensure_running()  # the processes share it
    ours, theirs = socket.socketpair()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk with the log is full
            stream.flush()  # else both processes would write what is buffered
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _wait(theirs, parent, blocked)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    fork = _Fork(pid, ours)
    # OpenBLAS ends its threads before a fork. Other threads of libraries are still here.
    if len(os.listdir("/proc/self/task")) > 1:
        _end(fork)
        return
    _waiting = fork


class CoreProcess(QuickProcess):
    """Runs in the fork, or is spawned if there is none."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        global _waiting
        fork, _waiting = _waiting, None
        if fork is not None:
            try:
                return _Popen(process_obj, fork)
            except (OSError, _NeedsSpawn):  # it has ended, or cannot run this process
                _end(fork)
        return QuickProcess._Popen(process_obj)


class _NeedsSpawn(Exception):
    """A process needs open files of its parent, or another executable, as for NUMA binding."""


class _Popen(popen_spawn_posix.Popen):
    """The parent's view of the fork, which runs `process_obj`."""

    def __init__(self, process_obj: BaseProcess, fork: _Fork) -> None:
        self._fork = fork
        super().__init__(process_obj)

    def duplicate_for_child(self, fd: int) -> int:
        raise _NeedsSpawn

    def _launch(self, process_obj: BaseProcess) -> None:
        if os.fsdecode(spawn.get_executable()) != sys.executable:
            raise _NeedsSpawn
        state, work = io.BytesIO(), io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump((dict(os.environ), resource.getrlimit(_OPEN_FILES)), state)
            reduction.dump(spawn.get_preparation_data(process_obj.name), work)
            reduction.dump(process_obj, work)
        finally:
            context.set_spawning_popen(None)
        connection = self._fork.connection
        connection.sendall(_LENGTH.pack(state.tell()) + state.getvalue())
        connection.sendall(work.getvalue())
        self.pid = self._fork.pid
        self.sentinel = connection.detach()  # readable when the fork has ended
        self.finalizer = util.Finalize(self, os.close, (self.sentinel,))


def _end(fork: _Fork) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(fork.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(fork.pid, 0)
    fork.connection.close()


# ---------------------------------------------------------------------- in the fork


def _wait(connection: socket.socket, parent: int, blocked: set[int | signal.Signals]) -> NoReturn:
    """Wait for a process and run it."""
    status = 1
    try:
        # The first call needs the environment of the start to find the memory of the title.
        setproctitle.setproctitle("SACCADE::EngineCoreFork")
        die_with_parent(parent)
        os.setpgrp()  # a terminal's Ctrl-C would end it, but running requests may finish
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        (length,) = _LENGTH.unpack(_received(connection, _LENGTH.size))
        environment, open_files = reduction.ForkingPickler.loads(_received(connection, length))
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(_OPEN_FILES, open_files)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = spawn._main(os.dup(connection.fileno()), connection.fileno())
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _received(connection: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes. Ends this process if the server has ended."""
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        os._exit(0)
    return data

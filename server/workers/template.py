"""A process that has the server's imports and none of its secrets: forkservers are forked from it.

A forkserver that is executed imports torch, transformers and vLLM itself, for some seconds of
processor time and half a gigabyte that it shares with no other process. The template is forked from
the server after the imports, if the server has no secrets until then (`server.clean_start`). It
does nothing but fork, so that a forkserver can be replaced, and each of several front ends gets
one: they use the same socket, so each `Start` comes with a socket for the answer.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
from typing import NoReturn

import msgspec
import setproctitle

from server.workers import environment, forkserver_process
from server.workers.forked_process import ForkedProcess
from server.workers.process import die_with_parent
from server.workers.worker import WorkerSpec

# The answer comes when the template gets a processor.
_ANSWER_TIMEOUT_S = 30.0
_MAX_MESSAGE_BYTES = 4096
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Start(msgspec.Struct, frozen=True):
    """What a forkserver starts with, in a file: its environment, and what it loads."""

    variables: dict[str, str]
    spec: WorkerSpec | None


_start_decoder = msgspec.msgpack.Decoder(Start)
_template: socket.socket | None = None


def prepare(*secrets: int) -> None:
    """Fork the template, unless other threads run that a fork would lack. It closes the descriptors
    `secrets`.

    Call it on the main thread: the template ends with the thread that made it.
    """
    global _template
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk with the log is full
            stream.flush()  # else both processes would write what is buffered
    parent = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        ours.close()
        for fd in secrets:
            os.close(fd)
        _run(theirs, parent, blocked)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    # OpenBLAS ends its threads before a fork. Other threads of libraries are still here.
    if len(os.listdir("/proc/self/task")) > 1:
        ours.close()
        os.waitpid(pid, 0)
        return
    _template = ours


class TemplateFork:
    """A forkserver that was forked from the template: the part of `Popen` that is needed here."""

    def __init__(self, process: ForkedProcess) -> None:
        self.pid = process.pid
        self._process = process

    def poll(self) -> int | None:
        """None while the process goes on."""
        self._process.exit_code(0)
        return 0 if self._process.is_over else None

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        """Wait until the process has ended, which was killed if it had not."""
        self._process.end()


def start(spec: WorkerSpec | None, control: socket.socket) -> TemplateFork | None:
    """Start a forkserver with `spec`, whose other end of the connection is `control`. None if there
    is no template, or no longer. Blocks."""
    if _template is None:
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, os.fdopen(os.memfd_create("saccade-worker-spec"), "w+b") as file:
        file.write(msgspec.msgpack.encode(Start(environment.without_secrets(os.environ), spec)))
        file.flush()
        ours.settimeout(_ANSWER_TIMEOUT_S)
        try:
            fds = [theirs.fileno(), control.fileno(), file.fileno()]
            socket.send_fds(_template, [b"start"], fds)
            theirs.close()
            pid, received, _, _ = socket.recv_fds(
                ours, _MAX_MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return None
    if not received:
        return None
    return TemplateFork(ForkedProcess(int(pid), *received))


# ---------------------------------------------------------------------- in the template


def _run(control: socket.socket, parent: int, blocked: set[int | signal.Signals]) -> NoReturn:
    """Fork forkservers until the server and all front ends have ended."""
    try:
        setproctitle.setproctitle("SACCADE::Template")
        die_with_parent(parent)
        gc.freeze()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they have ended
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        while True:
            data, fds, _, _ = socket.recv_fds(control, _MAX_MESSAGE_BYTES, 3)
            if not data:
                break
            _fork(control, fds)
            for fd in fds:
                os.close(fd)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _fork(control: socket.socket, fds: list[int]) -> None:
    """Fork a forkserver and answer with its descriptors: a pipe that ends with it, and a pidfd if
    the system has them. No answer means that it cannot be forked."""
    answer, its_control, spec = fds
    parent = os.getpid()
    with contextlib.ExitStack() as opened:
        alive, held = os.pipe()
        opened.callback(os.close, alive)
        opened.callback(os.close, held)
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes
            return
        if pid == 0:
            control.close()
            os.close(alive)
            os.close(answer)
            _become(its_control, spec, parent)
        files = [alive]
        with contextlib.suppress(OSError):  # an old kernel, or a container without
            files.append(os.pidfd_open(pid))
            opened.callback(os.close, files[-1])
        try:
            with socket.socket(fileno=os.dup(answer)) as connection:
                socket.send_fds(connection, [str(pid).encode()], files)
        except OSError:  # the server has another forkserver by now
            os.kill(pid, signal.SIGKILL)


def _become(control: int, start_file: int, parent: int) -> NoReturn:
    """Be the forkserver."""
    status = 1
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        setproctitle.setproctitle("SACCADE::Forkserver")
        with os.fdopen(start_file, "rb") as file:
            file.seek(0)
            given = _start_decoder.decode(file.read())
        environment.become_without_secrets(given.variables)
        forkserver_process.serve(control, given.spec)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)

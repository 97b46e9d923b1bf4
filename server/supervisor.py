"""The supervisor of several front ends: starts the engine host and the front ends, and ends them.

It has one thread and uses no library that starts others, so that it can fork at any time: a front
end that has ended without being asked to is started again, while the others go on. One that hangs
is killed. If the engines have ended, or a front end cannot be started, everything ends.
"""

import contextlib
import logging
import mmap
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import setproctitle

from server import front_ends
from server.front_ends import Engines, FrontEnd, Link
from server.request.shared_usage import SharedUsages
from server.telemetry.service import notify
from server.workers.process import die_with_parent

log = logging.getLogger("saccade")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ENGINE_DIED = 1
# A front end that ends so many times in so many seconds is not started again.
_MOST_RESTARTS = 5
_RESTARTS_WITHIN_S = 300.0
# How often each front end is asked for a sign of life. Of a pause between two checks so much counts
# as silence: after a longer one, this process has not run either.
_CHECK_S, _MOST_COUNTED_S = 1.0, 2.0
# Memory for the limits of API keys.
_USAGE_BYTES = 4 << 20

Report = Callable[[str], None]


@dataclass
class _Child:
    """A process of the supervisor. `process` becomes readable when it has ended."""

    name: str
    pid: int
    process: int
    link: Link
    is_ready: bool = False
    status: int | None = None
    is_asked: bool = False
    silent_s: float = 0.0


class Supervisor:
    """Runs until everything has ended."""

    def __init__(
        self,
        run_engines: Callable[[Path, Link], int],
        run_front_end: Callable[[FrontEnd], int],
        folder: Path,
        report: Report,
    ) -> None:
        """`run_engines` and `run_front_end` are what the processes do; they return exit statuses.
        `folder` is for their sockets."""
        self._run_engines = run_engines
        self._run_front_end = run_front_end
        self._folder = folder
        self._report = report
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []
        self._front_ends: dict[int, _Child] = {}
        self._host: _Child | None = None
        self._engines: Engines | None = None
        self._listening: socket.socket | None = None
        self._count = 0
        self._loads = self._restarts = memoryview(b"")
        self._usage: mmap.mmap | None = None
        self._is_announced = False
        self._stops = 0  # signals
        self._is_ending = False
        self._failed = 0
        self._worst = 0
        self._ended_at: list[float] = []
        self._stall_s = 0.0
        self._checked_at = time.monotonic()

    def run(self) -> int:
        """Returns the exit status: that of what could not start, 1 if the engines have died or a
        front end cannot be kept running, 3 if requests were cut off."""
        with _Signals() as signals:
            self._selector.register(signals, selectors.EVENT_READ, signals)
            self._host = self._start("EngineHost", self._host_work)
            while self._children:
                for key, _ in self._selector.select(_CHECK_S):
                    if isinstance(key.data, _Signals):
                        for number in key.data.taken():
                            self._stop(number)
                    elif isinstance(key.data, _Child):
                        self._attend(key.data, is_over=key.fd == key.data.process)
                self._check_front_ends()
        if not self._is_announced and self._stops:
            raise KeyboardInterrupt
        return self._failed or self._worst

    # ------------------------------------------------------------------ processes

    def _start(self, name: str, work: Callable[[Link], int]) -> _Child:
        ours, theirs = Link.pair()
        others = [child.link for child in self._children]
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # the disk with the log is full
                stream.flush()
        parent = os.getpid()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            for link in (ours, *others):
                link.close()
            _become(name, parent, blocked, lambda: work(theirs))
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        child = _Child(name, pid, os.pidfd_open(pid), ours)
        self._children.append(child)
        self._selector.register(child.process, selectors.EVENT_READ, child)
        self._selector.register(ours, selectors.EVENT_READ, child)
        return child

    def _host_work(self, link: Link) -> int:
        # A terminal's SIGINT would end the engines, which the front ends need for their answers.
        os.setpgrp()
        return self._run_engines(self._folder, link)

    def _start_front_end(self, index: int) -> None:
        assert self._engines is not None
        assert self._listening is not None
        assert self._usage is not None
        listening, engines, usage = self._listening, self._engines, self._usage
        self._loads[index] = front_ends.NOT_ACCEPTING

        def work(link: Link) -> int:
            return self._run_front_end(
                FrontEnd(
                    index=index,
                    count=self._count,
                    folder=self._folder,
                    listening=listening,
                    engines=engines,
                    loads=self._loads,
                    restarts=self._restarts,
                    usage=usage,
                    link=link,
                )
            )

        self._front_ends[index] = self._start(f"FrontEnd_{index}", work)

    def _attend(self, child: _Child, *, is_over: bool) -> None:
        if child.status is not None:
            return
        if not is_over:
            received = child.link.receive()
            if received is None:
                self._selector.unregister(child.link)
            else:
                self._take(child, *received)
            return
        _, status = os.waitpid(child.pid, 0)
        child.status = os.waitstatus_to_exitcode(status)
        self._children.remove(child)
        self._selector.unregister(child.process)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(child.link)
        os.close(child.process)
        child.link.close()
        if child is self._host:
            self._note_end_of_engines(child)
        else:
            self._note_end_of_front_end(child)
        if not any(each is not self._host for each in self._children):
            self._end_engines()

    # ------------------------------------------------------------------ what they say

    def _take(self, child: _Child, message: dict[str, Any], files: list[int]) -> None:
        if child is self._host:
            self._take_engines(message, files)
            return
        if "alive" in message:
            child.is_asked, child.silent_s = False, 0.0
            return
        child.is_ready = True
        assert self._engines is not None
        hello = {bytes.fromhex(name): bytes.fromhex(text) for name, text in message["hello"]}
        self._engines = replace(self._engines, hello=hello)
        ready = sum(each.is_ready for each in self._front_ends.values())
        if ready == self._count and not self._is_announced and not self._is_ending:
            self._is_announced = True
            self._front_ends[0].link.send({"do": "announce"})
            notify("READY=1")

    def _take_engines(self, message: dict[str, Any], files: list[int]) -> None:
        """The engines start: now the front ends do."""
        listening, alive = files
        self._listening = socket.socket(fileno=listening)
        self._engines = Engines(message["address"], message["stats"], message["image_work"], alive)
        self._count = message["count"]
        self._stall_s = message["stall_s"]
        self._loads = front_ends.shared_numbers(self._count)
        self._restarts = front_ends.shared_numbers(self._count)
        self._usage = mmap.mmap(-1, _USAGE_BYTES)
        self._report(f"starting {self._count} front ends")
        for index in range(self._count):
            if not self._is_ending:
                self._start_front_end(index)

    def _check_front_ends(self) -> None:
        """Kill those that have been silent for too long."""
        now = time.monotonic()
        passed_s = now - self._checked_at
        if passed_s < _CHECK_S:
            return
        self._checked_at = now
        for index, child in self._front_ends.items():
            if not child.is_ready or child.status is not None:
                continue
            if not child.is_asked:
                child.is_asked = child.link.send({"do": "answer"})
                continue
            child.silent_s += min(passed_s, _MOST_COUNTED_S)
            if child.silent_s >= self._stall_s:
                log.error(
                    "front end %d has not answered for %g s; killing it", index, self._stall_s
                )
                _kill(child)

    # ------------------------------------------------------------------ ends

    def _stop(self, number: int) -> None:
        """The first signal lets running requests finish, the second one does not wait."""
        self._stops += 1
        self._is_ending = True
        if not self._is_announced:
            self._kill_all()
            return
        if self._stops == 1:
            notify("STOPPING=1")
            self._close_port()
        do = "end" if self._stops > 1 else "drain" if number == signal.SIGTERM else "drain now"
        self._tell_front_ends(do)

    def _tell_front_ends(self, do: str) -> None:
        for child in self._children:
            if child is self._host:
                continue
            if child.is_ready:
                child.link.send({"do": do})
            else:  # it is being started again, and has no requests
                _kill(child)

    def _close_port(self) -> None:
        if self._listening is not None:
            self._listening.close()

    def _note_end_of_engines(self, host: _Child) -> None:
        """The front ends notice it themselves."""
        assert host.status is not None
        if not self._is_ending:
            self._failed = host.status if host.status > 0 else _ENGINE_DIED
        self._is_ending = True
        if not self._is_announced:
            self._kill_all()
        for child in self._front_ends.values():
            if child.status is None and not child.is_ready:  # it waits for them
                _kill(child)

    def _note_end_of_front_end(self, child: _Child) -> None:
        index = next(place for place, each in self._front_ends.items() if each is child)
        assert child.status is not None
        self._loads[index] = front_ends.NOT_ACCEPTING
        if self._is_ending:
            if self._is_announced and not child.is_ready:
                return  # it was being started again, and was killed
            self._worst = max(self._worst, _reported(child.status))
            return
        cannot_start = not child.is_ready and child.status > 0
        if not self._is_announced or cannot_start or child.status == front_ends.ENGINES_LOST:
            self._give_up(_reported(child.status) or _ENGINE_DIED)
            return
        now = time.monotonic()
        recent = [each for each in self._ended_at if now - each < _RESTARTS_WITHIN_S]
        self._ended_at = [*recent, now]
        how = f"status {child.status}" if child.status >= 0 else f"signal {-child.status}"
        if len(self._ended_at) > _MOST_RESTARTS:
            log.error("a front end has ended with %s, again; stopping", how)
            self._give_up(_ENGINE_DIED)
            return
        log.error("front end %d has ended with %s; starting it again", index, how)
        self._restarts[index] += 1
        assert self._usage is not None
        lock = front_ends.usage_lock(self._folder)
        SharedUsages(self._usage, lock, index, self._count).forget_mine()
        self._start_front_end(index)

    def _give_up(self, status: int) -> None:
        """Everything has to end. Where requests run, they may finish."""
        self._failed = self._failed or status
        self._is_ending = True
        self._close_port()
        if self._is_announced:
            self._tell_front_ends("drain now")
        else:
            self._kill_all()

    def _end_engines(self) -> None:
        """No front end is left."""
        if self._host is not None and self._host.status is None and self._front_ends:
            self._host.link.send({"do": "end"})

    def _kill_all(self) -> None:
        for child in self._children:
            _kill(child)


def _reported(status: int) -> int:
    """The server's exit status for that of a front end that has ended by itself or by a signal."""
    return status if status >= 0 and status != front_ends.ENGINES_LOST else _ENGINE_DIED


def _kill(child: _Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)


class _Signals:
    """Signals as a file to be waited for, while its `with` block is open. After it they are
    ignored: the process is about to end."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def taken(self) -> list[int]:
        """The signals since the last call."""
        return [number for number in self._reader.recv(64) if number in _SIGNALS]

    def __enter__(self) -> "_Signals":
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The number is in the file."""


def _become(
    name: str, parent: int, blocked: set[int | signal.Signals], work: Callable[[], int]
) -> NoReturn:
    """Do `work` as a child of the supervisor, which alone decides when it ends: signals change
    nothing, but are not ignored, since programs that it executes would ignore them too."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, _ignore)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        die_with_parent(parent)
        os.environ.pop("NOTIFY_SOCKET", None)
        setproctitle.setproctitle(f"SACCADE::{name}")
        status = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)

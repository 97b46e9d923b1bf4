"""Servers as groups of processes: starting and ending them, their CPU time and their memory.

A server is started in its own session, so that all its processes can be found in /proc, including
those whose parent has died. Every wait is bounded, and `stop` leaves no process behind.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ENGINE_TITLES = ("VLLM::EngineCore", "VLLM::Worker")
_IMAGE_WORK_TITLES = ("SACCADE::ImageWorker", "SACCADE::Forkserver", "SACCADE::Template")
_FRONT_END_TITLE = "SACCADE::FrontEnd"
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_ROOT = Path(__file__).resolve().parent.parent
_START_LIMIT = 600.0
_STOP_LIMIT = 20.0
_END_LIMIT = 90.0  # above the 30 s in which running requests may end


class ServerFailed(RuntimeError):
    """A server did not start, or not in time."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds since the server started, including children that have ended."""

    event_loop: float  # the main thread of the server's first process, and of each front end
    other_threads: float  # of the same processes
    workers: float  # all other processes but those of the engine
    engine: float

    @property
    def front_end(self) -> float:
        return self.event_loop + self.other_threads + self.workers

    @property
    def total(self) -> float:
        return self.front_end + self.engine

    def __sub__(self, other: "Cpu") -> "Cpu":
        return Cpu(
            self.event_loop - other.event_loop,
            self.other_threads - other.other_threads,
            self.workers - other.workers,
            self.engine - other.engine,
        )


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    cpu: float
    ended_children: float  # CPU seconds of children that were waited for


class Server:
    """One running server; call `stop` at the end."""

    def __init__(
        self,
        name: str,
        command: list[str],
        port: int,
        ready: str,
        env: dict[str, str],
        log: Path,
        *,
        folder: Path = _ROOT,
        scraped: bool = False,
    ) -> None:
        """`scraped`: its metrics are scraped while it is measured."""
        self.name = name
        self.port = port
        self.scraped = scraped
        self._log = log
        self._ready = ready
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=env,
                start_new_session=True,
            )

    def wait_ready(self, interval: float = 0.5) -> None:
        """Return when the server is ready for requests; raise `ServerFailed` if it never is.
        `interval` is the pause between two checks in seconds."""
        deadline = time.monotonic() + _START_LIMIT
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get(self._ready)[0] == http.HTTPStatus.OK:
                    return
            time.sleep(interval)
        raise self._failed(f"was not ready after {_START_LIMIT:.0f} s")

    def get(self, path: str, key: str = "") -> tuple[int, bytes]:
        """Return status and body of a GET request, with an API key if one is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def check(self) -> None:
        """Raise `ServerFailed` if the server has ended."""
        if self._process.poll() is not None:
            raise self._failed(f"ended with status {self._process.returncode}")

    def end(self) -> int:
        """Send SIGTERM and return the exit status once the server has ended by itself."""
        self._process.terminate()
        return self._process.wait(_END_LIMIT)

    def stop(self) -> None:
        """End all processes of the server: first with SIGTERM, then with SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _STOP_LIMIT
            # The server ends its own children; the remaining ones are signalled one by one.
            for pid in [self._process.pid] if number == signal.SIGTERM else self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self.pids() and time.monotonic() < deadline:
                self._process.poll()  # collects the process once it has ended
                time.sleep(0.1)

    def cpu(self) -> Cpu:
        """Return the CPU time used so far."""
        first = workers = engine = event_loops = 0.0
        engines: set[int] = set()
        for process in self._processes():  # parents come before their children
            title = _title(process.pid)
            if process.parent in engines or title.startswith(_ENGINE_TITLES):
                engines.add(process.pid)
                engine += process.cpu + process.ended_children
            elif process.pid == self._process.pid or title.startswith(_FRONT_END_TITLE):
                first += process.cpu
                event_loops += _main_thread_cpu(process.pid)
                workers += process.ended_children
            else:
                workers += process.cpu + process.ended_children
        return Cpu(event_loops, first - event_loops, workers, engine)

    def cpu_by_role(self) -> dict[str, float]:
        """Return the CPU seconds of each kind of process, including children that have ended."""
        seconds: dict[str, float] = {}
        for process in self._processes():
            role = "server" if process.pid == self._process.pid else _role(_title(process.pid))
            used = process.cpu + process.ended_children
            seconds[role] = seconds.get(role, 0.0) + used
        return seconds

    @property
    def pid(self) -> int:
        """The id of the server's first process."""
        return self._process.pid

    def pids(self) -> list[int]:
        """Return the ids of all processes of the server."""
        return [process.pid for process in self._processes()]

    def engine_pids(self) -> list[int]:
        """Return the ids of the processes that run the model."""
        return [pid for pid in self.pids() if _title(pid).startswith(_ENGINE_TITLES)]

    def titled(self, text: str) -> list[int]:
        """Return the ids of the processes whose command lines contain `text`."""
        return [pid for pid in self.pids() if text in _title(pid)]

    def _failed(self, what: str) -> ServerFailed:
        lines = self._log.read_text(errors="replace").splitlines()
        return ServerFailed("\n".join([f"{self.name} {what}; its last output:", *lines[-40:]]))

    def _processes(self) -> list[_Process]:
        found: dict[int, _Process] = {}
        for process in _all_processes():
            if process.session == self._process.pid or process.parent in found:
                found[process.pid] = process
        return list(found.values())


def free_port() -> int:
    """Return a port that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def resident(pids: list[int]) -> int:
    """Return the sum of the processes' resident memory in bytes; shared pages count repeatedly."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int((_read(pid, "statm") or "0 0").split()[1]) * page for pid in pids)


def proportional(pids: list[int]) -> int:
    """Return the processes' memory in bytes (PSS); a page that n processes share counts 1/n."""
    return _rolled_up(pids, ("Pss:",))


def private(pids: list[int]) -> int:
    """Return the sum of the processes' memory that no other process shares, in bytes."""
    return _rolled_up(pids, ("Private_Clean:", "Private_Dirty:"))


def _rolled_up(pids: list[int], names: tuple[str, ...]) -> int:
    total = 0
    for pid in pids:
        for line in _read(pid, "smaps_rollup").splitlines():
            if line.startswith(names):
                total += int(line.split()[1]) * 1024
    return total


def _all_processes() -> Iterator[_Process]:
    """Yield the processes of the machine by ascending id, without those that end meanwhile."""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if stat := _read(pid, "stat"):
            fields = _fields(stat)
            cpu, ended_children = _seconds(fields[11:13]), _seconds(fields[13:15])
            yield _Process(pid, int(fields[1]), int(fields[3]), cpu, ended_children)


def _main_thread_cpu(pid: int) -> float:
    """Return the CPU seconds of the main thread, whose id is that of its process."""
    stat = _read(pid, f"task/{pid}/stat")
    return _seconds(_fields(stat)[11:13]) if stat else 0.0


def _fields(stat: str) -> list[str]:
    """Return the fields of a `stat` file that follow the name, which may contain any character."""
    return stat.rpartition(")")[2].split()


def _seconds(ticks: list[str]) -> float:
    return sum(map(int, ticks)) * _TICK


def _role(title: str) -> str:
    if title.startswith("VLLM::EngineCore"):
        return "engine core"
    if title.startswith("VLLM::Worker"):
        return "engine worker"
    if title.startswith(_IMAGE_WORK_TITLES) or "forkserver" in title:
        return "image workers"
    return "other"


def _title(pid: int) -> str:
    return _read(pid, "cmdline")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""

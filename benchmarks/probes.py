"""Probes of a server under load: its memory, and how fast it answers /health."""

import http.client
import statistics
import threading
import time
from types import TracebackType

from benchmarks import environment
from benchmarks.processes import Server, private, proportional, resident

_HEALTH_INTERVAL = 0.05
_MEMORY_INTERVAL = 0.5
_SCRAPE_INTERVAL = 5.0
_GPU_INTERVAL = 1.0
_TIMEOUT = 30.0


class _Probe(threading.Thread):
    """A thread that probes a server at fixed times until its `with` block ends."""

    def __init__(self, server: Server, interval: float) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._interval = interval
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self.join(timeout=2 * _TIMEOUT)

    def run(self) -> None:
        due = time.perf_counter()
        while not self._ended.wait(max(0.0, due - time.perf_counter())):
            self.look()
            due = max(due + self._interval, time.perf_counter())

    def look(self) -> None:
        raise NotImplementedError


class HealthProbe(_Probe):
    """Requests /health every 50 ms.

    While a request is pending, no other is sent. The omitted ones are added with the latencies that
    they would have had; otherwise the slowest moments would count the least.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server, _HEALTH_INTERVAL)
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_TIMEOUT)
        self.latencies: list[float] = []
        self.failures = 0

    def look(self) -> None:
        asked = time.perf_counter()
        try:
            self._connection.request("GET", "/health")
            response = self._connection.getresponse()
            response.read()
            self.failures += response.status != http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            self.failures += 1
            self._connection.close()
        latency = time.perf_counter() - asked
        self.latencies.append(latency)
        while (latency := latency - self._interval) > 0:
            self.latencies.append(latency)


class ScrapeProbe(_Probe):
    """Requests /metrics every five seconds, as the Prometheus in deploy/ does."""

    def __init__(self, server: Server) -> None:
        super().__init__(server, _SCRAPE_INTERVAL)
        self.latencies: list[float] = []

    def look(self) -> None:
        asked = time.perf_counter()
        status, _ = self._server.get("/metrics")
        if status == http.HTTPStatus.OK:
            self.latencies.append(time.perf_counter() - asked)


class GpuProbe(_Probe):
    """Reads each second how busy the GPUs are; useless, but harmless, where there are none."""

    def __init__(self, server: Server) -> None:
        super().__init__(server, _GPU_INTERVAL)
        self._shares: list[float] = []

    @property
    def share(self) -> float | None:
        """The mean share of the time in which a kernel ran, over all readings and GPUs."""
        return statistics.fmean(self._shares) if self._shares else None

    def look(self) -> None:
        lines = (environment.gpu("utilization.gpu") or "").splitlines()
        self._shares += [int(line) / 100 for line in lines]


class MemoryProbe(_Probe):
    """Finds the peak of a server's memory (PSS, summed over its processes).

    To compute the PSS, the kernel walks all pages of a process, which cannot get new ones then.
    Under load, this would stall the server. So only the resident memory is read under load, which
    costs nothing, and the PSS afterwards. The peak is the PSS plus the amount by which the resident
    memory exceeded its final value.

    Of processes that have started meanwhile, such as the children that decode videos, only their
    private memory counts: nearly all of the rest is that of the process they are forks of.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server, _MEMORY_INTERVAL)
        self._most = 0
        self._first = set(server.pids())
        self.peak = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self.peak = proportional(self._server.pids()) + max(0, self._most - self._now())

    def look(self) -> None:
        self._most = max(self._most, self._now())

    def _now(self) -> int:
        pids = self._server.pids()
        started = [pid for pid in pids if pid not in self._first]
        return resident([pid for pid in pids if pid in self._first]) + private(started)

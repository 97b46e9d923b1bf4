"""What is watched while a server is under load: its memory and how fast it answers /health."""

import http.client
import threading
import time
from types import TracebackType

from benchmarks.processes import Server, proportional, resident

_HEALTH_INTERVAL = 0.05
_MEMORY_INTERVAL = 0.5
_TIMEOUT = 30.0


class _Probe(threading.Thread):
    """A thread that looks at a server at fixed times until its `with` block ends."""

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
    """Asks for /health every 50 ms.

    While an answer is awaited no further question is asked. Those left out are added with the
    latencies that they would have had, as otherwise the slowest moments would count the least.
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


class MemoryProbe(_Probe):
    """Finds the peak of a server's memory (PSS, summed over its processes).

    The kernel walks all pages to tell the PSS, for some 40 ms of CPU. So it is asked only when
    the resident memory, which costs nothing to read, has grown by 1% since it was asked last.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server, _MEMORY_INTERVAL)
        self._resident = 0
        self.peak = 0
        self.look()

    def look(self) -> None:
        pids = self._server.pids()
        if (size := resident(pids)) > self._resident * 1.01:
            self._resident = size
            self.peak = max(self.peak, proportional(pids))

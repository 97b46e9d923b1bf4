"""CPU time of the event loop per fetch of a picture from a server on this machine.

    python -m benchmarks.fetch [--sizes 300000 3000000] [--fetches 400] [--json FILE]

The server runs in a separate process and keeps connections open. The fetcher has no cache, and
eight fetches run at a time. The output for each size is the CPU time of the loop's thread and the
elapsed time, both in milliseconds per fetch: the median of the rounds, and the least.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from server.ingest.fetch import Fetcher, FetchSettings

_CONCURRENT = 8
_ROUNDS = 9


class _Origin(asyncio.Protocol):
    """Answers each GET with the number of bytes in its path."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            size = int(head.split(b" ")[1].strip(b"/").partition(b"?")[0])
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            self._transport.write(bytes(size))


def _serve(port_sender: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Origin, "127.0.0.1", 0)
        port_sender.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@asynccontextmanager
async def _origin() -> AsyncIterator[int]:
    """The port of a server in a separate process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield await asyncio.to_thread(here.recv)
    finally:
        process.kill()
        process.join()


async def _round(fetcher: Fetcher, url: str, fetches: int) -> tuple[float, float]:
    """(CPU time of this thread, elapsed time) in ms per fetch."""
    numbers = iter(range(fetches))

    async def fetch_some() -> None:
        for number in numbers:
            await fetcher.fetch(f"{url}?{number}", "")

    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    await asyncio.gather(*(fetch_some() for _ in range(_CONCURRENT)))
    cpu_s, wall_s = time.thread_time() - cpu_s, time.perf_counter() - wall_s
    return 1000 * cpu_s / fetches, 1000 * wall_s / fetches


async def _measure(sizes: list[int], fetches: int) -> list[dict[str, float]]:
    results = []
    async with _origin() as port, Fetcher(FetchSettings(allow_private=True)) as fetcher:
        for size in sizes:
            url = f"http://127.0.0.1:{port}/{size}"
            await _round(fetcher, url, _CONCURRENT)
            rounds = [await _round(fetcher, url, fetches) for _ in range(_ROUNDS)]
            cpu_ms, wall_ms = zip(*rounds, strict=True)
            results.append(
                {
                    "bytes": size,
                    "loop_cpu_ms": statistics.median(cpu_ms),
                    "loop_cpu_ms_least": min(cpu_ms),
                    "elapsed_ms": statistics.median(wall_ms),
                }
            )
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[300_000, 3_000_000])
    parser.add_argument("--fetches", type=int, default=400, help="per round")
    parser.add_argument("--json", type=Path, help="result file")
    args = parser.parse_args()
    results = uvloop.run(_measure(args.sizes, args.fetches))
    for result in results:
        print(
            f"{result['bytes']:>9} bytes: {result['loop_cpu_ms']:.3f} ms of the event loop"
            f" (least {result['loop_cpu_ms_least']:.3f}), {result['elapsed_ms']:.3f} ms elapsed"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

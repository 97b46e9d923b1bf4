"""A load generator for overload: requests arrive at a rate, whether or not others were answered.

    python -m benchmarks.open_load < plan.json > result.json

Each source sends its bodies at random times (a Poisson process), or, as a closed loop, with a
number of clients that send the next request when the last one was answered. Every request has a
connection of its own, which is closed afterwards.
"""

import asyncio
import dataclasses
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

_SEED = 20261128


@dataclass(frozen=True, slots=True)
class Source:
    """One user's requests, for `seconds`, or until `bodies` (files) have been sent."""

    name: str
    key: str
    bodies: list[str]
    seconds: float
    rate: float = 0.0  # requests per second; 0 for a closed loop
    clients: int = 0  # of the closed loop


@dataclass(frozen=True, slots=True)
class Plan:
    """`timeout_s`: clients give up after so many seconds, and say so to the server."""

    port: int
    sources: list[Source]
    timeout_s: float


@dataclass(slots=True)
class Outcome:
    """One request. `status` is 0 without an answer; times are in seconds from its sending, but for
    `at_s`: its end, from the start of the source."""

    source: str
    status: int = 0
    complete: bool = False
    code: str = ""  # of an error
    retry_after: bool = False
    first_byte_s: float = 0.0
    total_s: float = 0.0
    at_s: float = 0.0


async def drive(plan: Plan, bodies: list[list[bytes]]) -> list[Outcome]:
    """Run all sources at the same time; `bodies` are the contents of their files."""
    runs = (_run(plan, source, each) for source, each in zip(plan.sources, bodies, strict=True))
    results = await asyncio.gather(*runs)
    return [outcome for result in results for outcome in result]


async def _run(plan: Plan, source: Source, bodies: list[bytes]) -> list[Outcome]:
    if not source.rate:
        return await _closed_loop(plan, source, bodies)
    arrivals = random.Random(f"{_SEED}{source.name}")
    begin = due = asyncio.get_running_loop().time()
    start = time.perf_counter()
    tasks = []
    for body in bodies:
        due += arrivals.expovariate(source.rate)
        if due - begin > source.seconds:
            break
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        tasks.append(asyncio.create_task(_request(plan, source, body, start)))
    return await asyncio.gather(*tasks)


async def _closed_loop(plan: Plan, source: Source, bodies: list[bytes]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    remaining = iter(bodies)
    start = time.perf_counter()

    async def client() -> None:
        for body in remaining:
            outcomes.append(await _request(plan, source, body, start))
            if outcomes[-1].at_s > source.seconds:
                return

    await asyncio.gather(*(client() for _ in range(source.clients)))
    return outcomes


async def _request(plan: Plan, source: Source, body: bytes, start: float) -> Outcome:
    outcome = Outcome(source.name)
    began = time.perf_counter()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: Bearer {source.key}\r\nX-Request-Timeout: {plan.timeout_s:g}\r\n\r\n"
    )
    writer = None
    try:
        async with asyncio.timeout(plan.timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", plan.port)
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            outcome.first_byte_s = time.perf_counter() - began
            _read_head(answer, outcome)
            _read_body(await reader.read(), outcome)
    except TimeoutError:
        outcome.code = "client_timeout"
    except (OSError, EOFError, asyncio.LimitOverrunError) as error:
        outcome.code = type(error).__name__
    finally:
        end = time.perf_counter()
        outcome.total_s, outcome.at_s = end - began, end - start
        if writer is not None:
            writer.close()
    return outcome


def _read_head(head: bytes, outcome: Outcome) -> None:
    outcome.status = int(head.split(b" ", 2)[1])
    outcome.retry_after = b"\r\nretry-after:" in head.lower()


def _read_body(body: bytes, outcome: Outcome) -> None:
    if outcome.status == 200:
        outcome.complete = b"data: [DONE]" in body and b'"error"' not in body
        return
    begin, end = body.find(b"{"), body.rfind(b"}")
    error: dict[str, Any] = json.loads(body[begin : end + 1]).get("error") or {}
    outcome.code = str(error.get("code"))


def _plan(text: str) -> Plan:
    fields = json.loads(text)
    sources = [Source(**source) for source in fields.pop("sources")]
    return Plan(sources=sources, **fields)


if __name__ == "__main__":
    given = _plan(sys.stdin.read())
    files = [[Path(body).read_bytes() for body in source.bodies] for source in given.sources]
    outcomes = uvloop.run(drive(given, files))
    json.dump([dataclasses.asdict(outcome) for outcome in outcomes], sys.stdout)

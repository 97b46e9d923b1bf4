"""The load generator: a small process that sends prebuilt requests and times the answers.

    python -m benchmarks.load < plan.json > result.json

It is a closed loop: `concurrency` threads, each with one kept-alive connection, send the
bodies of the plan in order. Each thread sends the next one once its last answer is complete. The
bodies are read into memory before the clock starts. Blocking sockets in threads proved to be the
lightest way to send large bodies: 1 ms of CPU for 6 MB, against 1.5 ms with asyncio. To stay
small it imports the standard library only.
"""

import dataclasses
import http.client
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
_EVENT = b"data: "


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send, and where."""

    port: int
    bodies: list[str]  # files, each the body of one request
    concurrency: int
    timeout: float  # a request fails after so many seconds without a byte from the server


@dataclass(slots=True)
class Answer:
    """The outcome of one request; times in seconds from the start of sending.

    With a stub, the model may generate only special tokens: then there is no text to time.
    """

    error: str = ""
    reconnected: bool = False
    first_token: float | None = None
    complete: float = 0.0
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Result:
    """The answers, in the order of the plan's bodies."""

    wall: float = 0.0
    cpu: float = 0.0  # CPU seconds of this process while it drove the server
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        fields = json.loads(text)
        answers = [Answer(**answer) for answer in fields.pop("answers")]
        return cls(answers=answers, **fields)


def drive(plan: Plan) -> Result:
    """Send every body once and return the answers."""
    bodies = [Path(body).read_bytes() for body in plan.bodies]
    answers = [Answer() for _ in bodies]
    turns = _Turns(len(bodies))

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", plan.port, timeout=plan.timeout)
        for turn in turns:
            _exchange(connection, bodies[turn], answers[turn])
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(plan.concurrency)]
    began, cpu = time.perf_counter(), _own_cpu()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Result(time.perf_counter() - began, _own_cpu() - cpu, answers)


class _Turns:
    """Gives the number of each request to one thread."""

    def __init__(self, count: int) -> None:
        self._numbers = iter(range(count))
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            return next(self._numbers)


def _exchange(connection: http.client.HTTPConnection, body: bytes, answer: Answer) -> None:
    began = time.perf_counter()
    try:
        response = _send(connection, body, answer)
        if response.status != http.HTTPStatus.OK:
            answer.error = f"{response.status}: {response.read()[:300].decode(errors='replace')}"
            return
        _read_events(response, answer, began)
        answer.complete = time.perf_counter() - began
        if not answer.error and not (answer.text or answer.completion_tokens):
            answer.error = "the answer is empty"
    except (OSError, http.client.HTTPException, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
        connection.close()  # the next request opens it again


def _send(
    connection: http.client.HTTPConnection, body: bytes, answer: Answer
) -> http.client.HTTPResponse:
    """Send the request; send it again, as clients do, if the server closed a kept connection."""
    kept = connection.sock is not None
    try:
        connection.request("POST", "/v1/chat/completions", body, _HEADERS)
        return connection.getresponse()
    except ConnectionError:  # also raised if the connection closes before the first byte
        if not kept:
            raise
    answer.reconnected = True
    connection.close()
    connection.request("POST", "/v1/chat/completions", body, _HEADERS)
    return connection.getresponse()


def _read_events(response: http.client.HTTPResponse, answer: Answer, began: float) -> None:
    """Read the stream to its end; the first token is the first event that carries any text."""
    ended = False
    for line in response:
        if not line.startswith(_EVENT):
            continue
        ended = line.startswith(_EVENT + b"[DONE]")
        if not ended:
            _read_event(json.loads(line[len(_EVENT) :]), answer, began)
    if not ended and not answer.error:
        answer.error = "the stream was truncated"


def _read_event(event: dict[str, Any], answer: Answer, began: float) -> None:
    if "error" in event:
        answer.error = str(event["error"])[:300]
    for choice in event.get("choices") or ():
        text = choice["delta"].get("content")
        if text and answer.first_token is None:
            answer.first_token = time.perf_counter() - began
        answer.text += text or ""
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    outcome = drive(Plan(**json.load(sys.stdin)))
    json.dump(dataclasses.asdict(outcome), sys.stdout)

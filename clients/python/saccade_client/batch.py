"""Many requests from a file of JSON lines, several at a time, which may be interrupted and resumed.

lines -> those not done yet -> requests, `concurrency` at a time -> journal -> output in order

The lines are those of OpenAI's Batch API, so the same file can be sent to `/v1/batches`:

    {"custom_id": "1", "body": {"messages": [...], "max_tokens": 64}}

or short: `{"custom_id": "1", "question": "What is this?", "files": ["a.jpg"], "max_tokens": 64}`.
Results are written to a journal beside the output as they come. When all are there, the output has
them in the order of the input.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saccade_client.answers import Answer
from saccade_client.client import AsyncClient
from saccade_client.errors import (
    ApiError,
    ConnectionFailed,
    ConnectionLost,
    NotAuthorized,
    SaccadeError,
)
from saccade_client.lock import locked
from saccade_client.media import is_url, picture

JOURNAL_SUFFIX = ".partial"
_CHAT = "/v1/chat/completions"
_OF_THE_LINE = ("custom_id", "question", "files", "system")
_NO_OPTIONS = {"self", "messages", "conversation"}  # arguments of `Client.chat`


class InvalidLine(SaccadeError):
    """A line of the input that is no request."""


@dataclass(frozen=True)
class Request:
    """One request: its id, and the messages and options of `Client.chat`. The `digest` of its line
    tells whether a result is the answer to it."""

    id: str
    messages: list[Mapping[str, Any]]
    options: Mapping[str, Any]
    digest: str | None = None


@dataclass(frozen=True)
class Result:
    """What became of a request: an answer or an error. `digest` is that of the request."""

    id: str
    answer: Answer | None = None
    error: SaccadeError | None = None
    digest: str | None = None

    def line(self) -> dict[str, Any]:
        """The result as in an output file of OpenAI's Batch API, with the digest of the request."""
        response, error = None, None
        if self.answer is not None:
            body = self.answer.model_dump(mode="json", by_alias=True, exclude_none=True)
            request_id = self.answer.headers.get("x-request-id")
            response = {"status_code": 200, "request_id": request_id, "body": body}
        elif isinstance(self.error, ApiError):
            error = {"code": self.error.code, "message": str(self.error)}
            response = {
                "status_code": self.error.status,
                "request_id": self.error.request_id,
                "body": {"error": {**error, "param": self.error.param, "type": self.error.type}},
            }
        else:
            error = {"code": type(self.error).__name__, "message": str(self.error)}
        ids = {"id": self.id, "custom_id": self.id}
        return {**ids, "response": response, "error": error, "request_digest": self.digest}


def read(lines: Iterable[str], folder: Path | None = None) -> Iterator[Request]:
    """The requests in JSON lines; relative paths of `files` are below `folder`.

    Raises:
        InvalidLine: a line is no request, or its id is not new.
    """
    seen = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line), str(number), folder or Path())
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidLine(f"line {number}: {error}") from None
        if request.id in seen:
            raise InvalidLine(f"line {number}: custom_id {request.id!r} occurs twice")
        seen.add(request.id)
        yield request


def _request(line: Any, default_id: str, folder: Path) -> Request:
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    given_id = str(line.get("custom_id", default_id))
    asked = {name: value for name, value in line.items() if name != "custom_id"}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    if isinstance(body := line.get("body"), dict):
        if line.get("url", _CHAT) != _CHAT:
            raise ValueError(f"only {_CHAT} is supported, not {line['url']}")
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
            raise ValueError("body has no messages")
        return Request(given_id, messages, _options(body, ("messages",)), digest)
    if not isinstance(question := line.get("question"), str):
        raise ValueError("neither `body` nor `question`")
    files = line.get("files", [])
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError("`files` must be a list of paths and URLs")
    sources = [picture(name) if is_url(name) else folder / name for name in files]
    system = [{"role": "system", "content": line["system"]}] if "system" in line else []
    user = {"role": "user", "content": [*sources, question]}
    return Request(given_id, [*system, user], _options(line, _OF_THE_LINE), digest)


def _options(fields: dict[str, Any], others: Collection[str]) -> dict[str, Any]:
    options = {name: value for name, value in fields.items() if name not in others}
    if wrong := options.keys() & _NO_OPTIONS:
        raise ValueError(f"`{min(wrong)}` is no option of a request")
    return options


# ---------------------------------------------------------------------- asking


async def in_order(
    client: AsyncClient, requests: Iterable[Request], concurrency: int
) -> AsyncIterator[Result]:
    """The results in the order of the requests, of which `concurrency` run at a time. Those that
    wait for an earlier one are at most three times as many.

    Raises:
        ConnectionFailed, NotAuthorized: so that no other request would succeed either.
    """
    slots = asyncio.Semaphore(concurrency)

    async def one(request: Request) -> Result:
        async with slots:
            return await _result(client, request)

    tasks: deque[asyncio.Task[Result]] = deque()
    try:
        for request in requests:
            tasks.append(asyncio.create_task(one(request)))
            if len(tasks) >= 4 * concurrency:
                yield await tasks.popleft()
        while tasks:
            yield await tasks.popleft()
    finally:
        await _cancelled(tasks)


async def as_completed(
    client: AsyncClient, requests: Iterable[Request], concurrency: int
) -> AsyncIterator[Result]:
    """The results as they come. Raises as `in_order` does."""
    running: set[asyncio.Task[Result]] = set()
    left = iter(requests)
    try:
        while True:
            for request in itertools.islice(left, concurrency - len(running)):
                running.add(asyncio.create_task(_result(client, request)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            # Answers come first: an error ends the work.
            for task in sorted(done, key=lambda task: task.exception() is not None):
                yield task.result()
    finally:
        await _cancelled(running)


async def _result(client: AsyncClient, request: Request) -> Result:
    try:
        answer = await client.chat(request.messages, **request.options)
    except ConnectionLost as error:  # perhaps by this request only
        return Result(request.id, error=error, digest=request.digest)
    except (ConnectionFailed, NotAuthorized):
        raise
    except SaccadeError as error:
        return Result(request.id, error=error, digest=request.digest)
    return Result(request.id, answer, digest=request.digest)


async def _cancelled(tasks: Iterable[asyncio.Task[Result]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------------- files


class _Place(NamedTuple):
    """A result in a journal: where it is, whether it is an answer, and to which request."""

    at: int
    is_answer: bool
    digest: str | None


class Journal:
    """Results in a file beside the output, in the order in which they came. Whatever ends the
    process, the results up to then are kept.

    An output that is there already is taken over, so that its failed requests are tried again.
    """

    def __init__(self, output: Path) -> None:
        """Raises InvalidLine if the output has other lines than results, or is no file."""
        self._output = output = output.resolve()
        self._path = output.with_name(output.name + JOURNAL_SUFFIX)
        if output.exists() and not self._path.exists():
            if not output.is_file():
                raise InvalidLine(f"{output} is not a file")
            self._read(output, is_complete=True)
            os.replace(output, self._path)
        self._places, size = (
            self._read(self._path) if self._path.exists() else (dict[str, _Place](), 0)
        )
        self._file = self._path.open("a+b")
        self._file.truncate(size)

    def __contains__(self, request: Request) -> bool:
        """Whether the request has been answered: another one with the same id does not count."""
        place = self._places.get(request.id)
        return place is not None and place.is_answer and place.digest == request.digest

    def is_other(self, request: Request) -> bool:
        """Whether there is an answer, but to another request with the same id."""
        place = self._places.get(request.id)
        return place is not None and place.is_answer and place.digest != request.digest

    def add(self, result: Result) -> None:
        """Write a result."""
        at = self._file.seek(0, os.SEEK_END)
        self._places[result.id] = _Place(at, result.error is None, result.digest)
        self._file.write(json.dumps(result.line(), ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def finish(self, ids: Iterable[str]) -> None:
        """Write the output, in the order of `ids`, and delete the journal."""
        unfinished = self._output.with_name(self._output.name + ".sorted")
        with unfinished.open("wb") as file:
            for request_id in ids:
                self._file.seek(self._places[request_id].at)
                file.write(self._file.readline())
        os.replace(unfinished, self._output)
        self._path.unlink()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _read(path: Path, *, is_complete: bool = False) -> tuple[dict[str, _Place], int]:
        """The last result of each request; and the size of the whole lines. A line that the end of
        a process has cut off is left out, but none of a file that is complete."""
        places, at = dict[str, _Place](), 0
        with path.open("rb") as file:
            for line in file:
                is_whole = line.endswith(b"\n")
                try:
                    result = json.loads(line)
                    found = _Place(at, result["error"] is None, result.get("request_digest"))
                    place = {result["custom_id"]: found}
                except (ValueError, TypeError, KeyError):
                    if is_complete or (at == 0 and is_whole):
                        raise InvalidLine(f"{path} exists, and is no output of a batch") from None
                    place = {}
                if is_whole:
                    places |= place
                    at += len(line)
        return places, at


class Summary(NamedTuple):
    """How many requests failed, and how many were asked again because their lines have changed
    since they were answered."""

    failed: int
    changed: int


async def run(
    client: AsyncClient,
    lines: Iterable[str],
    output: Path,
    *,
    concurrency: int = 16,
    folder: Path | None = None,
    progress: Callable[[Result | None], None] = lambda result: None,
) -> Summary:
    """Answer the requests in `lines` and write the results to `output`.

    If it is interrupted, the next call goes on where this one stopped, and tries failed requests
    again. `progress` gets each result, and None for each request that was answered before.

    Raises:
        InvalidLine: a line is no request; `output` has something else.
        OutputLocked: another process writes `output`.
        ConnectionFailed, NotAuthorized: the server answers no more. What was answered is kept.
    """
    with locked(output), contextlib.closing(Journal(output)) as journal:
        ids, failed, changed = list[str](), 0, 0

        def left() -> Iterator[Request]:
            nonlocal changed
            for request in read(lines, folder):
                ids.append(request.id)
                if request in journal:
                    progress(None)
                else:
                    changed += journal.is_other(request)
                    yield request

        async for result in as_completed(client, left(), concurrency):
            journal.add(result)
            failed += result.error is not None
            progress(result)
        journal.finish(ids)
    return Summary(failed, changed)

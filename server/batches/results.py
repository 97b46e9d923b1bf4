"""The results of a batch, as they come: two logs on the disk, of answers and of errors.

Each line is one result in the form in which the client gets it. A line is durable when `append`
returns. A file that ends in the middle of a line, because the server was killed or the disk was
full, is cut back to its last whole line when it is opened; those requests run again. So each
request has one result in the end.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from server.batches.usage import Usage, read_answer
from server.ingest.files.disk import synchronize, translated
from server.telemetry import metrics

log = logging.getLogger("saccade")

_ID = re.compile(r"batch_req_[0-9a-f]{24}([0-9a-f]{8})")


class Response(msgspec.Struct):
    """An answer. `body` is JSON."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Result(msgspec.Struct):
    """A line of an output or error file, as in OpenAI's API."""

    id: str
    custom_id: str
    response: Response | None = None
    error: dict[str, str] | None = None


class _Body(msgspec.Struct):
    body: msgspec.Raw = msgspec.Raw()


class _Line(msgspec.Struct):
    """The parts of a line that are read again: which request it is about, and its answer."""

    id: str
    response: _Body | None = None


_ANSWERED, _FAILED = map(metrics.batch_requests.labels, ("answered", "failed"))
_LINES = msgspec.json.Decoder(_Line)


class _Pending(NamedTuple):
    number: int
    line: bytes
    body: msgspec.Raw | None
    written: "asyncio.Future[None]"


def request_id(batch_id: str, number: int) -> str:
    """The id of the request in line `number` of a batch."""
    return f"batch_req_{batch_id.removeprefix('batch_')[:24]}{number:08x}"


class ResultLog:
    """One of the logs. Its methods, but for `append`, block."""

    def __init__(self, path: Path, done: bytearray) -> None:
        """`done` has a 1 for each request that has a result, in any log. `usage` and `models` are
        those of all answers in this one."""
        self.path = path
        self.lines = 0
        self.nbytes = 0
        self.usage = Usage()
        self.models: set[str] = set()
        self._done = done
        self._fd = -1
        self._pending: list[_Pending] = []
        self._writing: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Open or create the file, and read which requests have a result. Raises
        FileStorageFailed."""
        with translated():
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(os.dup(self._fd), "rb") as file:
                for line in file:
                    number, body = _read(line)
                    if number is None or number >= len(self._done) or self._done[number]:
                        break
                    self._note(number, len(line), body)
            if (cut := os.fstat(self._fd).st_size - self.nbytes) > 0:
                log.warning("%s: removed %d bytes of unfinished results", self.path.name, cut)
                self._cut()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def append(self, number: int, result: Result) -> None:
        """Write the result of the request `number`. Results that come together are written
        together.

        Raises:
            FileStorageFailed: it is not in the log.
        """
        line = msgspec.json.encode(result)
        if b"\n" in line:  # within a body that was not written by us
            line = msgspec.json.format(line, indent=-1)
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body = None if result.response is None else result.response.body
        self._pending.append(_Pending(number, line + b"\n", body, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_pending())
        await written

    async def settle(self) -> None:
        """Wait until what was passed to `append` is written, also if its caller was cancelled."""
        while self._writing is not None:
            await asyncio.wait([self._writing])

    async def _write_pending(self) -> None:
        while self._pending:
            pending, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self._write, b"".join(each.line for each in pending))
            except Exception as error:
                for each in pending:
                    if not each.written.done():
                        each.written.set_exception(error)
                continue
            for each in pending:
                self._note(each.number, len(each.line), each.body)
                if not each.written.done():
                    each.written.set_result(None)
        self._writing = None

    def _write(self, data: bytes) -> None:
        """Write at the end of the last whole line: over what an attempt before may have left."""
        with translated():
            try:
                view, at = memoryview(data), self.nbytes
                while view:
                    count = os.pwrite(self._fd, view, at)
                    view, at = view[count:], at + count
                os.fdatasync(self._fd)
            except OSError:
                with contextlib.suppress(OSError):
                    self._cut()
                raise

    def _cut(self) -> None:
        os.ftruncate(self._fd, self.nbytes)
        os.fdatasync(self._fd)

    def _note(self, number: int, nbytes: int, body: msgspec.Raw | None) -> None:
        self._done[number] = 1
        self.lines += 1
        self.nbytes += nbytes
        if body is not None:
            usage, model = read_answer(body)
            self.usage += usage
            self.models.update(() if model is None else (model,))


def _read(line: bytes) -> tuple[int | None, msgspec.Raw | None]:
    """The number of the request that a line is about, None if it is not a whole line; and the body
    of the response."""
    try:
        read = _LINES.decode(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):  # ValueError is also msgspec's
        return None, None
    if read is None or (found := _ID.fullmatch(read.id)) is None:
        return None, None
    return int(found[1], 16), None if read.response is None else read.response.body


class Results:
    """Both logs of a batch of `total` requests, in `folder`."""

    def __init__(self, folder: Path, batch_id: str, total: int) -> None:
        self._done = bytearray(total)
        self.answers = ResultLog(folder / f"{batch_id}.output", self._done)
        self.errors = ResultLog(folder / f"{batch_id}.errors", self._done)

    @property
    def nbytes(self) -> int:
        return self.answers.nbytes + self.errors.nbytes

    def is_done(self, number: int) -> bool:
        return bool(self._done[number])

    def open(self) -> None:
        """Blocks. Raises FileStorageFailed."""
        self.answers.open()
        self.errors.open()
        with translated():
            synchronize(self.answers.path.parent)

    def close(self) -> None:
        self.answers.close()
        self.errors.close()

    async def append(self, number: int, result: Result) -> None:
        """Write the result of a request. Raises FileStorageFailed."""
        response = result.response
        is_answer = response is not None and response.status_code == 200
        await (self.answers if is_answer else self.errors).append(number, result)
        (_ANSWERED if is_answer else _FAILED).inc()

    def in_order(self) -> Iterator[bytes]:
        """Yield the lines of both logs in the order of the requests. Blocks. Raises OSError."""
        places = dict[int, tuple[BinaryIO, int, int]]()
        with self.answers.path.open("rb") as answers, self.errors.path.open("rb") as errors:
            for file in (answers, errors):
                start = 0
                for line in file:
                    if (number := _read(line)[0]) is not None:
                        places[number] = file, start, len(line)
                    start += len(line)
            for _, (source, start, size) in sorted(places.items()):
                yield os.pread(source.fileno(), size, start)

    async def settle(self) -> None:
        """Wait until everything is written."""
        await self.answers.settle()
        await self.errors.settle()

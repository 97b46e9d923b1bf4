"""The lines of an input file: one request each, checked before any of them runs.

Lines are read one by one. What of a line is not needed is skipped, never built as objects.
"""

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

# So many problems are reported; the rest of the file is not read then.
_MAX_PROBLEMS = 100
_MAX_ID_BYTES = 512
_MAX_URL_BYTES = 256


class Problem(msgspec.Struct, frozen=True):
    """What is wrong with an input file, as in OpenAI's API. `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass
class Item:
    """One request: `body` is JSON, until it is taken."""

    custom_id: str
    url: str
    body: bytes

    def take_body(self) -> bytes:
        """The body, which may be large and is not held any longer."""
        body, self.body = self.body, b""
        return body


@dataclass(frozen=True)
class LineLimits:
    """Most lines of a file, and most bytes of one."""

    lines: int
    line_bytes: int


class Lines:
    """The lines of a file that has been checked, by number."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._starts: array[int] = array("Q")
        self._sizes: array[int] = array("Q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, size: int) -> None:
        """Note that the next line is at these bytes of the file."""
        self._starts.append(start)
        self._sizes.append(size)

    def item(self, number: int) -> Item:
        """The request in line `number`, which counts from 0. Blocks. Raises OSError."""
        text = os.pread(self._file.fileno(), self._sizes[number], self._starts[number])
        line = msgspec.json.decode(text, type=_Line)
        return Item(_text(line.custom_id), _text(line.url), bytes(line.body))


def scan(
    file: BinaryIO, limits: LineLimits, wrong_url: Callable[[str], str | None]
) -> tuple[Lines, list[Problem]]:
    """Check all lines of `file`, which stays open; empty lines do not count. Blocks.

    `wrong_url` says what is wrong with the URL of a request. Raises OSError.
    """
    lines, problems, seen = Lines(file), list[Problem](), set[str]()
    number = start = 0
    file.seek(0)
    while len(problems) < _MAX_PROBLEMS and (text := file.readline(limits.line_bytes + 1)):
        number += 1
        size = len(text)
        if size > limits.line_bytes and not text.endswith(b"\n"):
            problems.append(_too_long(number, limits))
            size += _skip_line(file, limits.line_bytes)
        elif text.strip():
            if len(lines) == limits.lines:
                problems.append(_too_many(number, limits))
                break
            problem = _problem(text, seen, wrong_url)
            if problem is not None:
                problems.append(msgspec.structs.replace(problem, line=number))
            lines.add(start, size)
        start += size
    if not lines and not problems:
        problems.append(Problem("empty_file", "the input file has no requests", "input_file_id"))
    return lines, problems


def _too_long(number: int, limits: LineLimits) -> Problem:
    message = f"the line has more than {limits.line_bytes} bytes, which is the limit"
    return Problem("line_too_long", message, line=number)


def _too_many(number: int, limits: LineLimits) -> Problem:
    message = f"the input file has more than {limits.lines} requests, which is the limit"
    return Problem("too_many_requests", message, line=number)


def _skip_line(file: BinaryIO, step: int) -> int:
    """Read to the end of a line; returns the number of bytes."""
    skipped = 0
    while piece := file.readline(step):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


# ---------------------------------------------------------------------- one line


class _Line(msgspec.Struct):
    custom_id: msgspec.Raw = msgspec.Raw()
    method: msgspec.Raw = msgspec.Raw()
    url: msgspec.Raw = msgspec.Raw()
    body: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw()


_LINES = msgspec.json.Decoder(_Line)
_BODIES = msgspec.json.Decoder(_Body)


def _problem(text: bytes, seen: set[str], wrong_url: Callable[[str], str | None]) -> Problem | None:
    try:
        line = _LINES.decode(text)
    except (ValueError, RecursionError):  # ValueError is also msgspec's
        return Problem("invalid_json_line", "the line is not a JSON object")
    for name in _Line.__struct_fields__:
        if not bytes(getattr(line, name)):
            return Problem("missing_required_parameter", f"{name} is missing", name)
    try:
        custom_id = _text(line.custom_id, _MAX_ID_BYTES)
        if not custom_id:
            raise ValueError
    except ValueError:
        message = f"custom_id must be a string of 1 to {_MAX_ID_BYTES} bytes"
        return Problem("invalid_custom_id", message, "custom_id")
    if custom_id in seen:
        return Problem("duplicate_custom_id", "another line has the same custom_id", "custom_id")
    seen.add(custom_id)
    if bytes(line.method) != b'"POST"':
        return Problem("invalid_method", "method must be 'POST'", "method")
    try:
        why = wrong_url(_text(line.url, _MAX_URL_BYTES))
    except ValueError:
        why = "url must be a path"
    if why is not None:
        return Problem("invalid_url", why, "url")
    return _body_problem(bytes(line.body))


def _body_problem(body: bytes) -> Problem | None:
    try:
        streams = bytes(_BODIES.decode(body).stream)
    except (ValueError, RecursionError):
        return Problem("invalid_body", "body must be an object", "body")
    if streams == b"true":
        return Problem("invalid_body", "the requests of a batch cannot be streamed", "body.stream")
    return None


def _text(raw: msgspec.Raw, most: int | None = None) -> str:
    """A string of at most `most` bytes as JSON. Raises ValueError if it is none."""
    if most is not None and len(memoryview(raw)) > most + 2:
        raise ValueError
    return msgspec.json.decode(raw, type=str)

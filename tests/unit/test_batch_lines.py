"""The lines of a batch: what is refused, with the number of the line, and the memory it takes."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from server.batches.lines import Item, LineLimits, Lines, Problem, scan

CHAT = "/v1/chat/completions"
LIMITS = LineLimits(lines=1000, line_bytes=10_000)


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    document = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"n": 1}}
    kept = {name: value for name, value in (document | changes).items() if value is not None}
    return json.dumps(kept).encode()


def wrong_url(url: str) -> str | None:
    return None if url == CHAT else "it is wrong"


def scanned(text: bytes, limits: LineLimits = LIMITS) -> tuple[Lines, list[Problem]]:
    return scan(io.BytesIO(text), limits, wrong_url)


def test_requests_are_found_by_number(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    body = '{"text": "é\\n", "deep": [[1.50]]}'
    path.write_bytes(
        line("first") + b"\r\n\n  \n" + line("zweite-ü", body=None)[:-1]
        + f', "body": {body}, "more": 1}}'.encode()
    )  # fmt: skip
    with path.open("rb") as file:
        lines, problems = scan(file, LIMITS, wrong_url)
        assert (len(lines), problems) == (2, [])
        assert lines.item(0) == Item("first", CHAT, b'{"n": 1}')
        assert lines.item(1) == Item("zweite-ü", CHAT, body.encode())  # byte for byte


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[" * 9000, "invalid_json_line", None),
        (line(x=None)[:-1] + b', "x": ' + b"[" * 5000 + b"]" * 4000, "invalid_json_line", None),
        (line(None), "missing_required_parameter", "custom_id"),
        (line(body=None), "missing_required_parameter", "body"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line(7), "invalid_custom_id", "custom_id"),
        (line([[]] * 100), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("seen"), "duplicate_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(method={}), "invalid_method", "method"),
        (line(url="/v1/models"), "invalid_url", "url"),
        (line(url=["/v1"]), "invalid_url", "url"),
        (line(body=[1]), "invalid_body", "body"),
        (line(body={"stream": True}), "invalid_body", "body.stream"),
        (line(body={"n": "x" * 10_000}), "line_too_long", None),
    ],
)
def test_a_wrong_line_is_named(text: bytes, code: str, param: str | None) -> None:
    _, problems = scanned(b"\n".join([line("seen"), b"", text, line("last")]))
    (problem,) = problems
    assert (problem.code, problem.param, problem.line) == (code, param, 3)


@pytest.mark.parametrize("text", [b"", b"\n \n\r\n"])
def test_a_file_without_requests_is_refused(text: bytes) -> None:
    assert [problem.code for problem in scanned(text)[1]] == ["empty_file"]


def test_more_requests_than_the_limit_are_refused() -> None:
    text = b"\n".join(line(str(number)) for number in range(4))
    assert scanned(text, LineLimits(4, 1000))[1] == []
    (problem,) = scanned(text, LineLimits(3, 1000))[1]
    assert (problem.code, problem.line) == ("too_many_requests", 4)


def test_only_the_first_problems_are_told() -> None:
    assert len(scanned(b"{\n" * 5000)[1]) == 100


def test_a_huge_file_takes_little_memory(tmp_path: Path) -> None:
    """What is skipped would take gigabytes as objects."""
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for number in range(20):
            head = line(str(number), body=None)[:-1]
            file.write(head + b', "body": {"x": [' + b"[]," * 1_000_000 + b"0]}}\n")
        file.write(b"x" * (30 << 20))
    limits = LineLimits(1000, 4 << 20)
    with path.open("rb") as file:
        tracemalloc.start()
        lines, problems = scan(file, limits, wrong_url)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(lines) == 20
    assert [problem.code for problem in problems] == ["line_too_long"]
    assert peak < 5 * limits.line_bytes

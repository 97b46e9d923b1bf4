"""Errors: each class has its own code, and every code is documented."""

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from server import errors
from server.errors import ServerBusy
from server.http import errors as http_errors
from server.http.errors import as_markdown
from server.telemetry.record import Record


def test_the_error_documentation_is_up_to_date(repository: Path) -> None:
    assert (repository / "docs" / "errors.md").read_text() == as_markdown()


def test_every_error_class_has_a_unique_code_and_a_docstring() -> None:
    classes = list(errors.error_classes())
    assert len({error.code for error in classes}) == len(classes)
    assert all(error.__doc__ for error in classes)


def test_client_errors_and_only_those_have_a_4xx_status() -> None:
    for error in errors.error_classes():
        is_clients = issubclass(error, errors.ClientError)
        assert (400 <= error.status < 500) == is_clients
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(error.status, "invalid_request_error")
        assert (error.type == kind) == is_clients


def test_refusals_of_an_overloaded_server_are_logged_once_a_second(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_errors, "_OVERLOAD_LOG_S", 0.05)

    async def test() -> None:
        log = http_errors.OverloadLog()
        for _ in range(500):
            log.note(ServerBusy("full"))
        assert caplog.messages == ["server_busy: full"]
        while log._timer is not None:
            await asyncio.sleep(0.01)
        log.note(ServerBusy("full again"))

    asyncio.run(test())
    assert caplog.messages == [
        "server_busy: full",
        "499 more requests were refused with status 503",
        "server_busy: full again",
    ]


def shaped_error(event: bytes, dialect: http_errors.Dialect) -> tuple[dict[str, Any], str]:
    shaped, code = http_errors.shaped_event(event, dialect, Record("r-1"))
    return json.loads(shaped.rpartition(b"data: ")[2])["error"], code


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("given", [{}, {"message": None}, {"code": 200}, {"code": True}])
def test_an_error_event_without_a_message_or_a_status_is_an_internal_error(
    given: dict[str, Any], dialect: http_errors.Dialect
) -> None:
    error, code = shaped_error(b"data: " + json.dumps({"error": given}).encode(), dialect)
    assert (error["message"], code) == ("internal error", "internal_error")
    assert error["type"] == ("api_error" if dialect == "anthropic" else "server_error")


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, "not_found_error", "not_found"),
        (400, "invalid_request_error", "invalid_request"),
        (503, "overloaded_error", "server_busy"),
        (500, "api_error", "internal_error"),
    ],
)
def test_an_anthropic_error_event_has_the_type_of_its_status(
    status: int, kind: str, code: str
) -> None:
    event = b'event: error\ndata: {"type": "error", "error": {"message": "m", "code": %d}}' % status
    error, found = shaped_error(event, "anthropic")
    assert (error["type"], error["code"], found) == (kind, code, code)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"error": 3}', b'{"response": {}}'])
def test_an_event_without_an_error_object_is_unchanged(data: bytes) -> None:
    event = b"event: error\ndata: " + data
    assert http_errors.shaped_event(event, "openai", Record("r-1")) == (event, "internal_error")


def test_a_request_that_can_open_no_file_may_be_retried() -> None:
    failed = RuntimeError("a library's")
    failed.__cause__ = OSError(errno.EMFILE, "Too many open files")
    assert http_errors.as_clients(failed).status == 503
    assert http_errors.as_clients(OSError(errno.ENOENT, "No such file")).status == 500

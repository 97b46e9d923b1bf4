"""Errors: one code a class, and all of them documented."""

import asyncio
from pathlib import Path

import pytest

from server import errors
from server.errors import ServerBusy
from server.http import errors as http_errors
from server.http.errors import as_markdown


def test_the_documented_codes_are_these(repository: Path) -> None:
    assert (repository / "docs" / "errors.md").read_text() == as_markdown()


def test_every_class_has_a_code_of_its_own_and_says_when_it_is_raised() -> None:
    classes = list(errors.error_classes())
    assert len({error.code for error in classes}) == len(classes)
    assert all(error.__doc__ for error in classes)


def test_what_the_client_did_wrong_has_a_status_of_its_own_kind() -> None:
    for error in errors.error_classes():
        is_clients = issubclass(error, errors.ClientError)
        assert (400 <= error.status < 500) == is_clients
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
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

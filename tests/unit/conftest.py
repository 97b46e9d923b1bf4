"""Keeps servers out of these tests, which are to stay fast."""

import pytest


@pytest.fixture(scope="session")
def server() -> None:
    pytest.fail("tests/unit starts no server: this test belongs to tests/server")

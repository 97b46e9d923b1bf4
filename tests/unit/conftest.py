"""Keeps these tests fast: they start no server, and garbage collections skip the libraries."""

import atexit
import gc

import pytest

gc.disable()  # makes the imports of the test modules a fifth faster


def pytest_collection_finish() -> None:
    """Exclude the objects of the imported libraries, about a million, from garbage collection."""
    gc.freeze()
    gc.enable()


# Libraries report objects that are not freed at exit. Not earlier: pytest collects garbage at the
# end of the session.
atexit.register(gc.unfreeze)


@pytest.fixture(scope="session")
def server() -> None:
    pytest.fail("tests/unit starts no server: this test belongs to tests/server")

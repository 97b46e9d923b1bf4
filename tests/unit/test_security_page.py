"""SECURITY.md names a test for each promise."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "SECURITY.md"
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())))


def test_tests_are_named() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_each_named_test_exists(file: str, name: str) -> None:
    assert f"def {name}(" in (PAGE.parent / file).read_text()

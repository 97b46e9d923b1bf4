"""Where uploaded files are kept by default, and when the Files API is off."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from server.errors import CannotStart
from server.settings import FileSettings, Settings
from server.upload_folder import file_store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def stores(*given: FileSettings) -> tuple[list[bool], list[str]]:
    """Which of these servers, all running at the same time, have a store; and what they report."""
    reports: list[str] = []

    async def run() -> list[bool]:
        async with contextlib.AsyncExitStack() as stack:
            opened = [file_store(Settings(files=each), reports.append) for each in given]
            return [await stack.enter_async_context(each) is not None for each in opened]

    return asyncio.run(run()), reports


def test_files_are_in_the_cache_of_the_user_by_default(home: Path) -> None:
    assert stores(FileSettings()) == ([True], [])
    assert (home / ".cache/saccade/files/lock").exists()


@pytest.mark.parametrize("given", ["absolute", "relative"])
def test_the_cache_is_where_the_environment_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    cache = home / "elsewhere" if given == "absolute" else home / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache) if given == "absolute" else "elsewhere")
    assert stores(FileSettings()) == ([True], [])
    assert (cache / "saccade/files/lock").exists()


def test_a_flag_switches_files_off(home: Path) -> None:
    assert stores(FileSettings(files=False)) == ([False], [])
    assert list(home.iterdir()) == []


def test_files_are_off_where_the_default_folder_cannot_be_used(home: Path) -> None:
    (home / ".cache").write_text("not a folder")
    found, reports = stores(FileSettings())
    assert found == [False]
    assert "the Files API is off" in reports[0]


def test_a_folder_that_was_asked_for_must_be_usable(home: Path) -> None:
    (home / "file").write_text("not a folder")
    with pytest.raises(CannotStart, match="--files-dir"):
        stores(FileSettings(files_dir=home / "file"))

"""Settings: one declaration gives a flag, a variable and a default."""

import argparse
from pathlib import Path

import pytest

from server import settings as config


def parse(*flags: str) -> config.Settings:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.from_flags(parser.parse_args(flags))


def test_flags_override_defaults() -> None:
    assert parse().images.image_decode == "fast"
    assert parse("--image-decode", "exact").images.image_decode == "exact"
    assert parse("--fetch-timeout-s", "2.5").http.fetch_timeout_s == 2.5


def test_flags_override_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_IMAGE_WORKERS", "3")
    assert parse().images.image_workers == 3
    assert parse("--image-workers", "5").images.image_workers == 5


def test_the_error_names_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_IMAGE_WORKRES", "3")
    with pytest.raises(ValueError, match="unknown environment variable: SACCADE_IMAGE_WORKRES"):
        parse()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--image-workers", "0"),
        ("--image-workers", "many"),
        ("--image-decode", "best"),
        ("--max-image-bytes", "-1"),
    ],
)
def test_the_error_names_an_invalid_value(flag: str, value: str) -> None:
    with pytest.raises(ValueError, match=flag[2:].replace("-", "_")):
        parse(flag, value)


def test_every_setting_has_help_and_a_unique_name() -> None:
    names = [name for _, name, _ in config.leaves()]
    assert len(names) == len(set(names))
    assert all(field.description for _, _, field in config.leaves())


def test_the_settings_documentation_is_up_to_date(repository: Path) -> None:
    assert (repository / "docs" / "settings.md").read_text() == config.as_markdown()

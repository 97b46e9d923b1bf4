"""The table of architectures in docs/models.md is what vLLM's registry and our code say."""

import json
from pathlib import Path

import pytest

from tests import architectures, families


def test_the_page_has_the_table_that_the_code_gives() -> None:
    page = architectures.PAGE.read_text()
    assert page == architectures.written(page), "run: python -m tests.architectures"


def test_every_architecture_that_takes_pictures_is_decoded_in_workers() -> None:
    loaded = [row for row in architectures.rows() if row.level]
    assert {row.level.split()[0] for row in loaded} == {"pooled", "decoded"}
    assert len(loaded) > 80


@pytest.mark.parametrize("family", families.ARCHITECTURES)
def test_each_checkpoint_is_of_its_architecture(family: str, tmp_path: Path) -> None:
    folder = families.build(family, tmp_path)
    if family not in families.FLAGS or (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [families.ARCHITECTURES[family]]

"""The sample pictures of `saccade demo`, their questions, and the folder it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.demo import command
from server.demo.samples import Sample, samples
from server.demo.scoring import score


@pytest.fixture(scope="module")
def made() -> list[Sample]:
    return samples()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_partial_folder_of_the_same_demo_is_completed(tmp_path: Path) -> None:
    command.main([str(tmp_path)])
    before = contents(tmp_path)
    (tmp_path / "receipt.png").unlink()
    command.main([str(tmp_path)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["mine.txt", "receipt.png"])
def test_a_folder_with_other_files_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path)])
    assert ended.value.code == 1
    assert f"{tmp_path / name} is not part of this demo" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"mine"}


def test_boxes_enclose_the_shapes(made: list[Sample], tmp_path: Path) -> None:
    command.main([str(tmp_path)])
    for name in ("red-circle.png", "corner.png"):
        (sample,) = (sample for sample in made if name in sample.files)
        (answer,) = (it.answer for it in sample.questions if it.task == "box")
        pixels = np.asarray(Image.open(tmp_path / name)).astype(int)
        rows, columns = np.nonzero(abs(pixels - pixels[-1, -1]).sum(-1) > 100)
        height, width = pixels.shape[:2]
        found = [
            1000 * columns.min() / width,
            1000 * rows.min() / height,
            1000 * (columns.max() + 1) / width,
            1000 * (rows.max() + 1) / height,
        ]
        assert json.loads(answer) == pytest.approx(found, abs=8)


def test_every_expected_answer_is_scored_as_correct(made: list[Sample]) -> None:
    for sample in made:
        for question in sample.questions:
            assert score(question.task, question.answer, question.answer) == 1, question


def test_the_error_names_an_unreachable_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path), "--ask", "http://127.0.0.1:9"])
    assert ended.value.code == 1
    assert "saccade demo: " in capsys.readouterr().err

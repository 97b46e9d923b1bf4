"""`saccade demo`: its pictures, its folder, and that the demo model answers most of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.demo import command
from server.demo.samples import samples
from server.demo.scoring import score
from tests.conftest import Server

SAMPLES = samples()
LEAST_RIGHT = 47  # of 53; the shipped model answers 52
WITHOUT_THE_EXTRA = """
import sys
missing = ("font_amatic_sc", "font_caladea", "font_fredoka_one", "font_hanken_grotesk")
missing += ("font_manrope", "font_roboto", "font_source_sans_pro", "font_source_serif_pro")
missing += ("matplotlib", "skimage", "tqdm", "torch", "vllm")
sys.modules.update(dict.fromkeys(missing))
from server.cli import main
main(["demo", sys.argv[1]])
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_process_without_the_extra_writes_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    written = contents(folder)
    listed = written.pop("questions.md").decode()
    assert written == {name: data for sample in SAMPLES for name, data in sample.files.items()}
    for sample in SAMPLES:
        for name in sample.files:
            assert f"[{name}]({name})" in listed
        for question in sample.questions:
            assert f"| {question.text} | `{question.answer}` |" in listed


def test_a_folder_of_the_same_demo_is_completed(tmp_path: Path) -> None:
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
    assert f"{tmp_path / name} is not of this demo" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"mine"}


def test_boxes_are_where_the_shapes_are(tmp_path: Path) -> None:
    command.main([str(tmp_path)])
    for name in ("red-circle.png", "corner.png"):
        (sample,) = (sample for sample in SAMPLES if name in sample.files)
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


def test_every_expected_answer_counts_as_right() -> None:
    for sample in SAMPLES:
        for question in sample.questions:
            assert score(question.task, question.answer, question.answer) == 1, question


def test_a_server_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path), "--ask", "http://127.0.0.1:9"])
    assert ended.value.code == 1
    assert "saccade demo: " in capsys.readouterr().err


def test_the_demo_model_answers_most(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([str(tmp_path), "--ask", server.url])
    printed = capsys.readouterr().out
    count = sum(len(sample.questions) for sample in SAMPLES)
    (right,) = re.findall(rf"(\d+) of {count} right", printed)
    assert int(right) >= LEAST_RIGHT
    wrong = [line for line in printed.splitlines() if line.lstrip().startswith("WRONG")]
    assert int(right) + len(wrong) == count


def test_a_refusal_of_the_server_is_said(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path), "--ask", f"{server.url}/nowhere"])
    assert ended.value.code == 1
    assert "Not Found" in capsys.readouterr().err

"""`saccade demo --ask`: the demo model answers most questions about the samples correctly."""

import re
from pathlib import Path

import pytest

from server.demo import command
from server.demo.samples import samples
from tests.conftest import Server

LEAST_RIGHT = 47  # of 53; the shipped model answers 52


def test_the_demo_model_answers_most_questions_correctly(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([str(tmp_path), "--ask", server.url])
    printed = capsys.readouterr().out
    count = sum(len(sample.questions) for sample in samples())
    (right,) = re.findall(rf"(\d+) of {count} right", printed)
    assert int(right) >= LEAST_RIGHT
    wrong = [line for line in printed.splitlines() if line.lstrip().startswith("WRONG")]
    assert int(right) + len(wrong) == count


def test_a_server_error_is_reported(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(tmp_path), "--ask", f"{server.url}/nowhere"])
    assert ended.value.code == 1
    assert "Not Found" in capsys.readouterr().err

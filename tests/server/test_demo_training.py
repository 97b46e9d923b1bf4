"""The demo model's training, in small: it learns, it can be interrupted, it repeats itself."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.demo.training import vocabulary
from server.demo.training.examples import single
from tests.demo_twins import Twins

STEPS = 40  # two lines of the log


def start(output: Path, *more: str, path: Path | None = None) -> subprocess.Popen[str]:
    """A small run in a process group of its own; packages in a folder come before others."""
    small = ["--steps", str(STEPS), "--budget", "200", "--no-compile", *more]
    command = [sys.executable, "-m", "server.demo.training.train", "--output", str(output), *small]
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 800) -> tuple[int, str]:
    """The exit status and the trainer's words, which are shown if the test fails."""
    try:
        words = process.communicate(timeout=timeout)[1]
        print(words)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, words


def lines(output: Path) -> list[dict[str, Any]]:
    log = output / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    assert finish(start(output))[0] == 0
    return output


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whose group of processes is ended after its first line, begun again.

    Other processes draw its batches. Its log is left as if it had gone on behind the last
    saved state, and died in a line.
    """
    output = tmp_path_factory.mktemp("interrupted")
    process = start(output, "--drawers", "1")
    while not lines(output) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    assert len(lines(output)) >= 1
    assert lines(output)[-1]["step"] < STEPS
    with (output / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": STEPS, "seconds": 0, "losses": {}, "right": {}}) + "\n")
        log.write('{"step": 4')
    assert finish(start(output))[0] == 0
    return output


def test_it_learns(whole: Path) -> None:
    first, last = (line["losses"]["answers"] for line in lines(whole))
    assert last < 0.6 * first


def test_the_learning_curve_is_a_picture(whole: Path) -> None:
    with Image.open(whole / "learning_curve.png") as curve:
        curve.load()
        assert min(curve.size) > 400
        assert len(curve.getcolors(1 << 20) or []) > 10


def test_an_interrupted_run_is_the_same_run(whole: Path, interrupted: Path) -> None:
    """This also says that a run can be repeated: the first lines are of two runs."""
    steps = [line["step"] for line in lines(interrupted)]
    assert steps[0] == 20
    assert steps[-1] == STEPS
    assert steps == sorted(set(steps))
    seconds = [line["seconds"] for line in lines(interrupted)]
    assert seconds == sorted(seconds)
    for name in ("losses", "right"):
        assert lines(whole)[0][name] == lines(interrupted)[0][name]
    models = [output / "model" / "model.safetensors" for output in (whole, interrupted)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_what_is_saved_is_what_was_trained(whole: Path) -> None:
    codec = vocabulary.Codec(vocabulary.build())
    example = single(random.Random(3), "objects", (128, 96))
    del example.questions[1:]
    ours, theirs, logits, expected = Twins(whole / "model").compare(codec, example, [(3, 4)])
    assert ours == theirs
    assert (logits - expected).abs().max() < 1e-3


def test_a_run_from_weights_keeps_their_tokens(whole: Path, tmp_path: Path) -> None:
    given, output = tmp_path / "given", tmp_path / "output"
    shutil.copytree(whole / "model", given)
    described = json.loads((given / "tokenizer.json").read_text())
    numbers = described["model"]["vocab"]
    numbers["red"], numbers["blue"] = numbers["blue"], numbers["red"]
    (given / "tokenizer.json").write_text(json.dumps(described))
    for steps in (21, 22):  # from the weights, and then from the saved state
        weights = ["--weights", str(given), "--first-step", "20", "--steps", str(steps)]
        assert finish(start(output, *weights))[0] == 0
        assert lines(output)[-1]["step"] == steps
        written = json.loads((output / "model" / "tokenizer.json").read_text())
        assert written["model"]["vocab"] == numbers


def test_a_picture_that_cannot_be_drawn_ends_the_run(tmp_path: Path) -> None:
    """Other processes draw: what went wrong in them is said, and none is waited for."""
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").touch()
    status, words = finish(start(tmp_path / "output", "--drawers", "1", path=tmp_path), 200)
    assert status == 1
    assert "no photo" in words


def test_processes_that_cannot_have_as_many_shares_are_refused(tmp_path: Path) -> None:
    status, words = finish(start(tmp_path, "--shares", "3", "--processes", "2"), 100)
    assert status == 2
    assert "--shares must be a multiple of --processes" in words

"""Small training runs of the demo model learn, are repeatable, and resume after interruptions."""

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

from server.demo.training import train, vocabulary
from server.demo.training.examples import single
from tests.demo_twins import Twins

STEPS, LOG_EVERY = 24, 4
SEED_OF_A_PHOTO = "14"  # with this seed, the first batch has a photo of scikit-image


def start(output: Path, *more: str, path: Path | None = None) -> subprocess.Popen[str]:
    """Start a small run in its own process group; packages in `path` shadow installed ones."""
    small = ["--steps", str(STEPS), "--log-every", str(LOG_EVERY), "--budget", "200"]
    small += ["--no-compile", *more]
    command = [sys.executable, "-m", "server.demo.training.train", "--output", str(output), *small]
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 800) -> tuple[int, str]:
    """The exit status and stderr of a run. Stderr is printed, so a failed test shows it."""
    try:
        stderr = process.communicate(timeout=timeout)[1]
        print(stderr)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, stderr


def lines(output: Path) -> list[dict[str, Any]]:
    log = output / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert finish(start(output))[0] == 0
    return output


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, interrupted after the first line of its log and started again.

    Before the interruption, other processes draw its batches. Its log then gets lines that are
    newer than the saved state, the last one incomplete, as after a crash.
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


def test_the_loss_falls_during_training(whole: Path) -> None:
    losses = [line["losses"]["answers"] for line in lines(whole)]
    assert len(losses) == STEPS // LOG_EVERY
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_draws_its_learning_curve(whole: Path) -> None:
    with Image.open(whole / "learning_curve.png") as curve:
        curve.load()
        assert min(curve.size) > 400
        assert len(curve.getcolors(1 << 20) or []) > 10


def test_an_interrupted_run_ends_with_the_same_weights(whole: Path, interrupted: Path) -> None:
    """The first log lines come from independent runs, so this also shows that runs repeat."""
    steps = [line["step"] for line in lines(interrupted)]
    assert steps[0] == LOG_EVERY
    assert steps[-1] == STEPS
    assert steps == sorted(set(steps))
    seconds = [line["seconds"] for line in lines(interrupted)]
    assert seconds == sorted(seconds)
    for name in ("losses", "right"):
        assert lines(whole)[0][name] == lines(interrupted)[0][name]
    models = [output / "model" / "model.safetensors" for output in (whole, interrupted)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_the_saved_model_gives_the_same_logits_in_transformers(whole: Path) -> None:
    codec = vocabulary.Codec(vocabulary.build())
    example = single(random.Random(3), "objects", (128, 96))
    del example.questions[1:]
    ours, theirs, logits, expected = Twins(whole / "model").compare(codec, example, [(3, 4)])
    assert ours == theirs
    assert (logits - expected).abs().max() < 1e-3


def test_a_run_from_given_weights_keeps_their_token_ids(whole: Path, tmp_path: Path) -> None:
    given, output = tmp_path / "given", tmp_path / "output"
    shutil.copytree(whole / "model", given)
    described = json.loads((given / "tokenizer.json").read_text())
    numbers = described["model"]["vocab"]
    numbers["red"], numbers["blue"] = numbers["blue"], numbers["red"]
    (given / "tokenizer.json").write_text(json.dumps(described))
    one_process = ["--processes", "1", "--shares", "1"]
    for steps in (21, 22):  # from the weights, and then from the saved state
        weights = ["--weights", str(given), "--first-step", "20", "--steps", str(steps)]
        weights += one_process
        assert finish(start(output, *weights))[0] == 0
        assert lines(output)[-1]["step"] == steps
        written = json.loads((output / "model" / "tokenizer.json").read_text())
        assert written["model"]["vocab"] == numbers


def test_a_failure_to_draw_a_picture_ends_the_run(tmp_path: Path) -> None:
    """Child processes draw the pictures; their error is reported, and no process keeps waiting."""
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").touch()
    more = ["--drawers", "1", "--seed", SEED_OF_A_PHOTO]
    status, stderr = finish(start(tmp_path / "output", *more, path=tmp_path), 200)
    assert status == 1
    assert "no photo" in stderr
    assert not lines(tmp_path / "output")


def test_shares_not_divisible_by_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--output", str(tmp_path), "--shares", "3", "--processes", "2"])
    assert ended.value.code == 2
    assert "--shares must be a multiple of --processes" in capsys.readouterr().err

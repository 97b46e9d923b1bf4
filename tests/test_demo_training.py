"""The demo model's training, in small: it learns, it can be interrupted, it repeats itself."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from server.demo import checkpoint, vocabulary
from server.demo.examples import single
from server.demo.network import Network
from tests.demo_twins import Twins

STEPS = 40  # two lines of the log


def start(output: Path) -> subprocess.Popen[str]:
    small = ["--steps", str(STEPS), "--budget", "400", "--no-compile"]
    command = [sys.executable, "-m", "server.demo.train", "--output", str(output), *small]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> int:
    """The exit status; the trainer's words are shown if the test fails."""
    try:
        print(process.communicate(timeout=800)[1])
    finally:
        process.kill()
    return process.returncode


def lines(output: Path) -> list[dict[str, Any]]:
    log = output / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    assert finish(start(output)) == 0
    return output


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, ended by a signal after its first line and begun again.

    Its log is left as if it had gone on behind the last saved state, and died in a line.
    """
    output = tmp_path_factory.mktemp("interrupted")
    process = start(output)
    while not lines(output) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM
    assert len(lines(output)) >= 1
    assert lines(output)[-1]["step"] < STEPS
    with (output / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": STEPS, "seconds": 0, "losses": {}, "right": {}}) + "\n")
        log.write('{"step": 4')
    assert finish(start(output)) == 0
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


def test_tokens_keep_their_embeddings_when_their_numbers_change(tmp_path: Path) -> None:
    tokenizer = vocabulary.build()
    described = json.loads(tokenizer.to_str())
    numbers = described["model"]["vocab"]
    red, blue, green = numbers["red"], numbers["blue"], numbers["green"]
    numbers |= {"red": blue, "blue": red, "unheard": green}
    del numbers["green"]
    described["model"]["merges"] = []
    other = Tokenizer.from_str(json.dumps(described))
    saved, network = Network(), Network()
    weights = saved.state_dict()
    checkpoint.save({f"network.{name}": it for name, it in weights.items()}, other, tmp_path)
    before = weights["model.language_model.embed_tokens.weight"].bfloat16().float()
    after = network.get_parameter("model.language_model.embed_tokens.weight")
    own = after[green].clone()
    checkpoint.load(network, tokenizer, tmp_path)
    assert torch.equal(after[red], before[blue])
    assert torch.equal(after[blue], before[red])
    assert torch.equal(after[green], own)
    places = weights["model.visual.pos_embed.weight"].bfloat16().float()
    assert torch.equal(network.get_parameter("model.visual.pos_embed.weight"), places)


def test_a_state_of_other_words_is_refused(whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / "state.pt", weights_only=True)
    torch.save(state | {"tokenizer": "{}"}, tmp_path / "state.pt")
    process = start(tmp_path)
    assert finish(process) != 0
    assert not (tmp_path / "log.jsonl").exists()

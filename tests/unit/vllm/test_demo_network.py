"""The trained network is the served one: Transformers computes the same results."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from server.demo import scoring
from server.demo.training import checkpoint, vision, vocabulary, words
from server.demo.training.examples import Example, several, single
from server.demo.training.network import Network
from server.demo.training.targets import Grid
from tests import demo_pictures
from tests.demo_twins import Twins
from tests.pictures import text_part

SHIPPED = Path(scoring.__file__).parent
CODEC = vocabulary.Codec(vocabulary.build())


def one_picture() -> tuple[Example, list[Grid]]:
    return single(random.Random(5), "objects", (224, 160)), [(5, 7)]


def several_pictures() -> tuple[Example, list[Grid]]:
    return several(random.Random(5), [(128, 128), (96, 160), (160, 96)]), [(4, 4), (5, 3), (3, 5)]


def a_clip() -> tuple[Example, list[Grid]]:
    return single(random.Random(5), "clip", (160, 128), frames=4), [(4, 5)] * 2


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Random weights with which every parameter affects the output."""
    torch.manual_seed(3)
    weights = {
        f"network.{name}": 0.06 * torch.randn_like(parameter) + float("norm" in name)
        for name, parameter in Network().named_parameters()
    }
    folder = tmp_path_factory.mktemp("random")
    checkpoint.save(weights, CODEC.tokenizer, folder)
    return Twins(folder)


@pytest.mark.parametrize("make", [one_picture, several_pictures, a_clip])
@pytest.mark.parametrize("worded", [False, True])
def test_transformers_computes_the_same_logits(twins: Twins, make, worded: bool) -> None:
    example, grids = make()
    del example.questions[1:]
    ours, theirs, logits, expected = twins.compare(CODEC, example, grids, worded=worded)
    assert ours == theirs
    assert expected.std() > 0.3  # not equal because both are zero
    assert (logits - expected).abs().max() < 1e-3


def test_a_saved_checkpoint_has_the_shipped_configuration(twins: Twins) -> None:
    """Only the weights differ."""
    names = {path.name for path in twins.folder.iterdir()} - {"model.safetensors"}
    assert names == {path.name for path in SHIPPED.iterdir() if path.suffix in {".json", ".jinja"}}
    for name in names:
        assert (twins.folder / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_the_processor_normalizes_as_in_training() -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        processor = json.loads((SHIPPED / name).read_text())
        assert processor["image_mean"] == list(vision.MEAN)
        assert processor["image_std"] == list(vision.DEVIATION)


def right_answers(model: Any, processor: Any) -> float:
    """The share of pictures that the model describes correctly."""
    shapes = demo_pictures.SHAPES[::5]
    message = {"role": "user", "content": [{"type": "image"}, text_part(demo_pictures.WHAT)]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    images = [demo_pictures.drawn(*shape) for shape in shapes]
    inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(ids, skip_special_tokens=True)
    right = sum(
        answer == words.article(f"{color} {shape}")
        for answer, (color, shape, _) in zip(answers, shapes, strict=True)
    )
    return right / len(shapes)


def test_wrong_normalization_gives_wrong_answers() -> None:
    """So a server that normalizes differently fails the tests of its answers."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    assert right_answers(model, processor) == 1
    processor.image_processor.image_mean = [0.0] * 3
    processor.image_processor.image_std = [1 / 255] * 3
    assert right_answers(model, processor) < 0.5

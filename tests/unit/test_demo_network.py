"""The network that is trained is the one that is served: Transformers computes the same."""

import random
from pathlib import Path

import pytest
import torch

from server.demo import scoring
from server.demo.training import checkpoint, vocabulary
from server.demo.training.examples import Example, several, single
from server.demo.training.network import Network
from server.demo.training.targets import Grid
from tests.demo_twins import Twins

CODEC = vocabulary.Codec(vocabulary.build())


def one_picture() -> tuple[Example, list[Grid]]:
    return single(random.Random(5), "objects", (224, 160)), [(5, 7)]


def several_pictures() -> tuple[Example, list[Grid]]:
    return several(random.Random(5), [(128, 128), (96, 160), (160, 96)]), [(4, 4), (5, 3), (3, 5)]


def a_clip() -> tuple[Example, list[Grid]]:
    return single(random.Random(5), "clip", (160, 128), frames=4), [(4, 5)] * 2


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Weights of chance, in which every parameter counts."""
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
def test_transformers_computes_the_same(twins: Twins, make, worded: bool) -> None:
    example, grids = make()
    del example.questions[1:]
    ours, theirs, logits, expected = twins.compare(CODEC, example, grids, worded=worded)
    assert ours == theirs
    assert expected.std() > 0.3  # it is not the same because it is nothing
    assert (logits - expected).abs().max() < 1e-3


def test_a_saved_checkpoint_has_the_shipped_configuration(twins: Twins) -> None:
    """Only the weights differ."""
    shipped = Path(scoring.__file__).parent
    names = {path.name for path in twins.folder.iterdir()} - {"model.safetensors"}
    assert names == {path.name for path in shipped.iterdir() if path.suffix in {".json", ".jinja"}}
    for name in names:
        assert (twins.folder / name).read_bytes() == (shipped / name).read_bytes(), name

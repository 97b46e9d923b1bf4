"""The namespace of embeddings: it changes with everything that they depend on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from server.engine.embedding_cache import identity
from server.engine.embedding_cache.identity import UnknownWeights, namespace


def configured(model: Path, **options: Any) -> VllmConfig:
    return EngineArgs(model=str(model), max_model_len=1024, **options).create_engine_config()


@pytest.fixture(scope="module")
def demo(repository: Path) -> Path:
    return repository / "server" / "demo"


@pytest.fixture
def model(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "model"))


@pytest.fixture(scope="module")
def name(demo: Path) -> str:
    return namespace(configured(demo))


def test_a_model_has_the_same_namespace_at_any_path(name: str, model: Path, tmp_path: Path) -> None:
    assert namespace(configured(model)) == name
    moved = model.rename(tmp_path / "elsewhere")
    assert namespace(configured(moved)) == name
    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")


def test_unrelated_files_and_options_do_not_change_the_namespace(name: str, model: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    (model / "README.md").write_text("A model.")
    assert namespace(configured(model, seed=7, max_num_seqs=3)) == name


def test_different_weights_at_the_same_path_change_the_namespace(name: str, model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    found = weights.stat()
    weights.write_bytes(data)
    assert weights.stat().st_size == found.st_size
    assert namespace(configured(model)) != name


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"mm_processor_kwargs": {"max_pixels": 100_352}},
        {"hf_overrides": {"vision_config": {"hidden_act": "relu"}}},
        {"load_format": "dummy"},
    ],
)
def test_different_options_change_the_namespace(
    name: str, demo: Path, options: dict[str, Any]
) -> None:
    config = configured(demo)
    if "dtype" in options and str(config.model_config.dtype) == "torch.float32":
        options = {"dtype": "bfloat16"}
    assert namespace(configured(demo, **options)) != name


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_different_configuration_changes_the_namespace(name: str, model: Path) -> None:
    path = model / "preprocessor_config.json"
    before = path.read_text()
    rewritten(path, lambda document: document.update(image_mean=[0.1, 0.2, 0.3]))
    assert namespace(configured(model)) != name
    path.write_text(before)
    assert namespace(configured(model)) == name
    rewritten(model / "config.json", lambda document: document.update(a_field="of the future"))
    assert namespace(configured(model)) != name


def test_different_model_code_changes_the_namespace(name: str, model: Path) -> None:
    code = model / "modeling_own.py"
    code.write_text("scale = 1")
    first = namespace(configured(model))
    code.write_text("scale = 2")
    assert len({name, first, namespace(configured(model))}) == 3


def test_a_different_vllm_version_changes_the_namespace(
    name: str, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "vllm_version", "0.0.1")
    assert namespace(configured(demo)) != name


def test_the_seed_of_dummy_weights_changes_the_namespace(demo: Path) -> None:
    names = {namespace(configured(demo, load_format="dummy", seed=seed)) for seed in (1, 2)}
    assert len(names) == 2


def test_missing_weights_are_an_error(model: Path) -> None:
    config = configured(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UnknownWeights):
        namespace(config)
    shutil.rmtree(model)
    with pytest.raises(UnknownWeights):
        namespace(config)

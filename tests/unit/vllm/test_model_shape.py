"""Models are planned from their configuration: what vLLM itself would allocate for them."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from server.engine.arguments import DEMO_MODEL, parse
from server.engine.model_shape import PlannedModel, read
from server.errors import CannotPlan
from server.plan import plans
from server.planner.flags import add_flags
from server.planner.shape import Attention

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
# Llama 3.1 8B, and a model of its size whose heads are not grouped.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def model(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def asked(*words: object) -> Namespace:
    args, _ = parse([*map(str, words), "--gpu", "h100"], "plan", add_flags)
    return args


def planned(*words: object) -> PlannedModel:
    return read(asked(*words))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    return planned(model(tmp_path_factory.mktemp("llama")), "--skip-tokenizer-init")


def test_llama_has_the_known_numbers(llama: PlannedModel) -> None:
    shape = llama.shape
    assert shape.encoder is None
    assert shape.weight_bytes == 2 * 8_030_261_248
    assert shape.language.attention == (Attention(32, 4096),)
    assert shape.kv.bytes_per_token == 128 * KIB
    assert shape.kv.split(8).bytes_per_token == 16 * KIB
    eight_bits = shape.kv.in_fp8()
    assert eight_bits is not None
    assert eight_bits.bytes_per_token == 64 * KIB


@pytest.mark.parametrize(("image_tokens", "at_once"), [(0, 640), (576, 301), (3 * 576, 146)])
def test_requests_in_40_gib(llama: PlannedModel, image_tokens: int, at_once: int) -> None:
    """Texts of 500 tokens, with no, one and three pictures of LLaVA-1.5."""
    assert int(llama.shape.kv.concurrency(40 * GIB, 500 + image_tokens)) == at_once


def test_heads_that_are_not_grouped_take_four_times_as_much(tmp_path: Path) -> None:
    kv = planned(model(tmp_path, num_key_value_heads=32), "--skip-tokenizer-init").shape.kv
    assert kv.bytes_per_token == 512 * KIB
    assert kv.request_bytes(256) == 128 * MIB  # 134 MB: a picture of 224 pixels, 16 x 16 patches


def test_layers_with_a_window_stop_growing(tmp_path: Path) -> None:
    folder = model(
        tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=1024
    )
    shape = planned(folder, "--skip-tokenizer-init", "--max-num-batched-tokens", 2048).shape
    assert shape.language.attention == (Attention(32, 4096, 1024),)
    # The window, and the tokens of a step.
    assert shape.kv.request_bytes(20_000) == shape.kv.request_bytes(10_000)
    assert shape.kv.request_bytes(20_000) < 3200 * shape.kv.bytes_per_token


def test_the_demo_model_weighs_what_its_file_holds() -> None:
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as file:
        parameters = sum(
            math.prod(file.get_slice(name).get_shape())
            for name in set(file.keys()) - {"lm_head.weight"}
        )
    shape = planned(DEMO_MODEL, "--dtype", "float32").shape
    assert shape.weight_bytes == 4 * parameters
    assert shape.encoder is not None
    assert shape.encoder.patch == 16


def test_variants_of_a_request() -> None:
    words = (DEMO_MODEL, "--image", "640x480", "--images", "2", "--gpu", "l4", "--prompt", "20")
    args, settings = parse([*map(str, words)], "plan", add_flags)
    found = read(args)
    variants = dict(plans(found.shape, found.make_rule(), args, settings))
    whole = variants.pop("as asked")
    assert whole.workload.image_tokens == 2 * 300
    assert list(variants) == [
        "KV cache in FP8",
        *("max_image_tokens 300", "max_image_tokens 300, FP8"),
        *("max_image_tokens 150", "max_image_tokens 150, FP8"),
    ]
    assert variants["max_image_tokens 300"].workload.image_tokens <= 300
    assert all(each.concurrency > whole.concurrency for each in variants.values())


def test_a_request_longer_than_the_model_is_refused() -> None:
    args, settings = parse([str(DEMO_MODEL), "--gpu", "l4", "--prompt", "9000"], "plan", add_flags)
    with pytest.raises(CannotPlan, match="9,200 tokens, and the model takes 8,192"):
        plans(read(args).shape, None, args, settings)


def test_a_text_model_takes_no_pictures(llama: PlannedModel) -> None:
    args, settings = parse([str(DEMO_MODEL), "--gpu", "l4", "--image", "9x9"], "plan", add_flags)
    with pytest.raises(CannotPlan, match="takes no pictures"):
        plans(llama.shape, llama.make_rule(), args, settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "unknown GPU 'h1000'"),
        (["--gpu", "h100", "--image", "0x7"], "'0x7' is not a size in pixels"),
        (["--gpu", "h100", "--output", "0"], "must be 1 to"),
        ([], "--gpu"),
    ],
)
def test_wrong_arguments_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse([str(DEMO_MODEL), *words], "plan", add_flags)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_vllm_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(CannotPlan, match="^vLLM cannot build this model here: [^\n]+$"):
        planned(tmp_path)

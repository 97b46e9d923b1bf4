"""Creates a checkpoint for benchmarks on a CPU: a scaled-down Qwen2-VL with the 2B's proportions.

The weights are random and always the same. A picture of 448x448 takes 256 tokens, and no picture
takes more. The vocabulary and the chat template are those of the demo model.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from server.engine.vllm_adapter import plugin

plugin.make_torchvision_importable()  # before transformers imports torchvision

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

DEMO = Path(__file__).resolve().parent.parent / "server" / "demo"
PATCH, MERGE = 14, 2
MOST_TOKENS = 256
"""Tokens that a picture takes at most."""

_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SEED = 20


def qwen2_vl(folder: Path) -> Path:
    """Write the checkpoint (float32, 0.3 GB) into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        shutil.copyfile(DEMO / name, folder / name)
    special = _special_ids(folder)
    config = _config(special)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        model = Qwen2VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]
        _draw_weights(model, silent=list(special.values()))
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    pixels = (PATCH * MERGE) ** 2
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 4 * pixels,
        "max_pixels": MOST_TOKENS * pixels,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    return folder


def _special_ids(folder: Path) -> dict[str, int]:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added if token["special"]}


def _config(special: dict[str, int]) -> Qwen2VLConfig:
    text = {
        "vocab_size": json.loads((DEMO / "config.json").read_text())["text_config"]["vocab_size"],
        "hidden_size": 384,
        "intermediate_size": 2240,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [8, 12, 12],
        },
        "tie_word_embeddings": False,
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    vision = {
        "depth": 16,
        "embed_dim": 320,
        "hidden_size": text["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        dtype="float32",
        tie_word_embeddings=False,
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
    )


def _draw_weights(model: Qwen2VLForConditionalGeneration, silent: list[int]) -> None:
    """Initialise the matrices so that signals neither vanish nor explode and the picture matters.

    The output rows of the `silent` tokens are zero, so that no answer consists of them.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    head = model.lm_head.weight
    head.mul_(2)  # well separated log-probabilities
    head[silent] = 0

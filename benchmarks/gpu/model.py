"""Writes a model folder without weights, for `--load-format dummy`: Qwen3-VL in the shape of its
2B, or a tiny one to try the benchmark on a CPU.

Speed depends on shapes, not on the values of weights. The tokenizer is that of the demo model,
with further entries up to the vocabulary of the 2B: the model may sample any of them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

_DEMO = Path(__file__).resolve().parents[2] / "server" / "demo"
_COPIED = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# As in the published configuration of Qwen3-VL-2B-Instruct.
_TEXT_2B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000,
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
    },
}
_VISION_2B = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "out_hidden_size": 2048,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
    "hidden_act": "gelu_pytorch_tanh",
}
_PIXELS = {"shortest_edge": 65_536, "longest_edge": 16_777_216}


def qwen3_vl(folder: Path, *, tiny: bool) -> Path:
    """Write the folder, and return it. `tiny`: in the shape of the demo model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        shutil.copyfile(_DEMO / name, folder / name)
    config = _read("config.json")
    if not tiny:
        config["text_config"] |= _TEXT_2B
        config["vision_config"] |= _VISION_2B
    tokenizer = _read("tokenizer.json")
    _extend(tokenizer["model"]["vocab"], config["text_config"]["vocab_size"])
    processor = _read("preprocessor_config.json")
    if not tiny:
        processor |= {"size": _PIXELS}
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("preprocessor_config.json", processor),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_DEMO / name).read_text())
    return content


def _extend(vocabulary: dict[str, int], size: int) -> None:
    """Add entries, which no text contains, up to `size`."""
    first = max(vocabulary.values()) + 1
    vocabulary |= {f"<{number}>": number for number in range(first, size)}

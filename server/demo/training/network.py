"""The network of the demo model, for training: Qwen3-VL.

Parameters have the names and shapes of Transformers' Qwen3VLForConditionalGeneration, so they can
be saved unchanged, and the formulas are those of its modeling file. The pictures of a batch share
one grid, and several questions share one prefix, so everything is plain matrix products.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from server.demo.training import vocabulary
from server.demo.training.language import Language, TextConfig
from server.demo.training.vision import Vision, VisionConfig


def configuration(text: TextConfig, vision: VisionConfig) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "bfloat16",
        "image_token_id": vocabulary.IMAGE,
        "video_token_id": vocabulary.VIDEO,
        "vision_start_token_id": vocabulary.VISION_START,
        "vision_end_token_id": vocabulary.VISION_END,
        "tie_word_embeddings": True,
        "text_config": asdict(text) | {"model_type": "qwen3_vl_text", "dtype": "bfloat16"},
        "vision_config": asdict(vision) | {"model_type": "qwen3_vl", "dtype": "bfloat16"},
    }


class Inner(nn.Module):
    def __init__(self, text: TextConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.visual = Vision(vision)
        self.language_model = Language(text)


class Network(nn.Module):
    """The whole model. Its state_dict is what model.safetensors holds."""

    def __init__(self, text: TextConfig | None = None, vision: VisionConfig | None = None) -> None:
        super().__init__()
        self.text, self.vision = text or TextConfig(), vision or VisionConfig()
        self.model = Inner(self.text, self.vision)

    def see(self, pictures: list[tuple[Tensor, tuple[int, int]]]) -> Tensor:
        """Vision tokens (batch, tokens, hidden) of pictures, each (patches, grid of tokens)."""
        return torch.cat([self.model.visual(*picture) for picture in pictures], 1)

    def read(
        self, ids: Tensor, seen: Tensor | None, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (batch, length, hidden) of token ids whose vision tokens are `seen`: those
        of the last layer and those halfway."""
        x = self.model.language_model.embed_tokens(ids)
        if seen is not None:
            vision = (ids == vocabulary.IMAGE) | (ids == vocabulary.VIDEO)
            x = x.masked_scatter(vision[..., None], seen.reshape(-1, seen.shape[-1]))
        result: tuple[Tensor, Tensor] = self.model.language_model(x, positions, mask)
        return result

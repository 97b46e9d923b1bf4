"""The network of the demo model, for training: Qwen3-VL.

Parameters have the names and shapes of Transformers' Qwen3VLForConditionalGeneration, so that they
can be saved as they are, and the formulas are those of its modeling file. The pictures of a batch
share one grid, and several questions share one prefix: all is plain matrix products.
"""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from server.demo import vocabulary
from server.demo.language import Language, TextConfig, TextLayer
from server.demo.vision import FRAMES, Vision, VisionBlock, VisionConfig


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

    def read(self, ids: Tensor, seen: Tensor | None, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (batch, length, hidden) of token ids, with vision tokens in their place."""
        x = self.model.language_model.embed_tokens(ids)
        if seen is not None:
            vision = (ids == vocabulary.IMAGE) | (ids == vocabulary.VIDEO)
            x = x.masked_scatter(vision[..., None], seen.reshape(-1, seen.shape[-1]))
        result: Tensor = self.model.language_model(x, positions, mask)
        return result

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Random weights: what is added to the residual stream starts at zero, and positions and
        coordinates start as Fourier features, so that near ones are alike."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=0.6 * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
        for layer in self.model.language_model.layers:
            assert isinstance(layer, TextLayer)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for block in self.model.visual.blocks:
            assert isinstance(block, VisionBlock)
            block.attn.proj.weight.zero_()
            block.mlp.linear_fc2.weight.zero_()
        visual = self.model.visual
        weight = visual.patch_embed.proj.weight
        weight.normal_(std=0.5 * (weight[0].numel() * FRAMES) ** -0.5, generator=generator)
        axis = torch.linspace(0, 1, visual.side)
        features = _fourier(torch.cartesian_prod(axis, axis), 4)
        mixing = torch.randn(features.shape[1], weight.shape[0], generator=generator)
        visual.pos_embed.weight.copy_(features @ mixing * 0.3 * features.shape[1] ** -0.5)
        words = self.model.language_model.embed_tokens.weight
        words.normal_(std=words.shape[1] ** -0.5, generator=generator)
        features = _fourier(torch.linspace(0, 1, len(vocabulary.COORDINATES))[:, None], 8)
        mixing = torch.randn(features.shape[1], words.shape[1], generator=generator)
        numbers = features @ mixing * (features.shape[1] * words.shape[1]) ** -0.5
        words[-len(vocabulary.COORDINATES) + 1 :] = numbers[1:]


def _fourier(places: Tensor, waves: int) -> Tensor:
    """Features (n, 1 + ...) of places (n, axes) from 0 to 1."""
    features = [2 * places - 1]
    for wave in range(1, waves + 1):
        features += [(math.pi * wave * places).cos(), (math.pi * wave * places).sin()]
    return torch.cat(features, 1)

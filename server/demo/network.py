"""The network of the demo model, for training: Qwen3-VL, computed in batches of one grid.

Parameters have the names and shapes of Transformers' Qwen3VLForConditionalGeneration, so that they
can be saved as they are, and the formulas are those of its modeling file. The pictures of a batch
share one grid, and several questions share one prefix: all is plain matrix products.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.demo import vocabulary

PATCH = 16  # pixels
MERGE = 2  # patches of a token, along each side
CELL = PATCH * MERGE  # pixels of a token
FRAMES = 2  # frames of a patch
# Qwen's means and deviations, of 0 to 1. The shipped processor configuration has the same.
MEAN = (0.5, 0.5, 0.5)
DEVIATION = (0.5, 0.5, 0.5)

_MASKED = -30000.0


@dataclass(frozen=True)
class TextConfig:
    """The language model; names as in Transformers."""

    vocab_size: int = vocabulary.SIZE
    hidden_size: int = 192
    intermediate_size: int = 576
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int = vocabulary.END_OF_TEXT
    eos_token_id: int = vocabulary.END
    pad_token_id: int = vocabulary.END_OF_TEXT
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "rope_theta": 30.0,
        }
    )


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder; names as in Transformers."""

    depth: int = 6
    hidden_size: int = 192
    intermediate_size: int = 768
    out_hidden_size: int = 192
    num_heads: int = 3
    in_channels: int = 3
    patch_size: int = PATCH
    spatial_merge_size: int = MERGE
    temporal_patch_size: int = FRAMES
    num_position_embeddings: int = 256
    deepstack_visual_indexes: list[int] = field(default_factory=list)
    hidden_act: str = "silu"


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (..., length, head_dim)."""
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of (batch, heads, length, head_dim).

    Written out, since on a CPU it trains several times as fast in bfloat16 as the fused kernel.
    """
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        weights = weights + mask
    mixed: Tensor = weights.softmax(-1) @ value
    return mixed


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (FRAMES, PATCH, PATCH)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, kernel)

    def forward(self, patches: Tensor) -> Tensor:
        """(batch, patches, 3 * frames * 16 * 16) to (batch, patches, hidden), 1 or 2 frames."""
        weight = self.proj.weight
        if patches.shape[-1] == 3 * PATCH * PATCH:
            weight = weight.sum(2)  # a picture is two frames that are the same
        embedded: Tensor = functional.linear(patches, weight.flatten(1), self.proj.bias)
        return embedded


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class VisionMlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear_fc2(functional.silu(self.linear_fc1(x)))
        return result


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Merger(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size * MERGE**2
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches, hidden) to (batch, patches / 4, out_hidden)."""
        merged = self.norm(x).view(x.shape[0], x.shape[1] // MERGE**2, -1)
        result: Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(merged)))
        return result


class Vision(nn.Module):
    """The vision encoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = math.isqrt(config.num_position_embeddings)
        self.head_dim = config.hidden_size // config.num_heads
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """uint8 patches (batch, patches, pixels) of a grid of tokens to (batch, tokens, hidden)."""
        dtype = self.pos_embed.weight.dtype
        mean, deviation = _normalization(patches.shape[-1])
        x = self.patch_embed(((patches.float() - mean) / deviation).to(dtype))
        interpolation, cos, sin = _grid_tables(grid, self.side, self.head_dim, dtype)
        x = x + interpolation @ self.pos_embed.weight
        for block in self.blocks:
            x = block(x, cos, sin)
        merged: Tensor = self.merger(x)
        return merged


@lru_cache(maxsize=4)
def _normalization(width: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of 0 to 255 for each number of a patch: channels come first."""
    each = width // 3
    return (
        torch.tensor(MEAN).repeat_interleave(each) * 255,
        torch.tensor(DEVIATION).repeat_interleave(each) * 255,
    )


def in_token_order(x: Tensor) -> Tensor:
    """(rows, columns, ...) of patches to (rows * columns, ...), the four of a token in a row."""
    rows, columns, *rest = x.shape
    x = x.view(rows // MERGE, MERGE, columns // MERGE, MERGE, *rest)
    return x.transpose(1, 2).reshape(rows * columns, *rest)


@lru_cache(maxsize=512)
def _grid_tables(
    grid: tuple[int, int], side: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For a grid of tokens: weights of (patches, side * side) by which the position embeddings are
    interpolated, and cosines and sines of (patches, head_dim) of the rotary ones."""
    rows, columns = grid[0] * MERGE, grid[1] * MERGE
    weights = torch.einsum("ay,bx->abyx", _interpolation(rows, side), _interpolation(columns, side))
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    places = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1
    ).float()
    angles = in_token_order((places[..., None] * frequencies).flatten(2))
    angles = torch.cat((angles, angles), -1)
    return (
        in_token_order(weights.flatten(2)).to(dtype),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    )


def _interpolation(count: int, side: int) -> Tensor:
    """Linear weights of (count, side), corners on corners."""
    places = torch.linspace(0, side - 1, count)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)


class TextAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        width, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, self.heads * dim, bias=False)
        self.k_proj = nn.Linear(width, self.shared * dim, bias=False)
        self.v_proj = nn.Linear(width, self.shared * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, width, bias=False)
        self.q_norm = nn.RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, length, heads, -1)

        query = self.q_norm(split(self.q_proj(x), self.heads)).transpose(1, 2)
        key = self.k_norm(split(self.k_proj(x), self.shared)).transpose(1, 2)
        value = split(self.v_proj(x), self.shared).transpose(1, 2)
        repeat = self.heads // self.shared
        mixed = attend(
            rotate(query, cos, sin),
            rotate(key, cos, sin).repeat_interleave(repeat, 1),
            value.repeat_interleave(repeat, 1),
            mask,
        )
        result: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return result


class TextMlp(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = TextAttention(config)
        self.mlp = TextMlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Language(nn.Module):
    """The language model."""

    axes: Tensor
    frequencies: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        pairs = config.head_dim // 2
        axes = torch.zeros(pairs, dtype=torch.long)
        sections = config.rope_parameters["mrope_section"]
        for axis in (1, 2):
            axes[axis : sections[axis] * 3 : 3] = axis
        theta = config.rope_parameters["rope_theta"]
        self.register_buffer("axes", axes, persistent=False)
        self.register_buffer(
            "frequencies", theta ** (-torch.arange(pairs).float() / pairs), persistent=False
        )

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (batch, length, hidden), positions (3, batch, length), mask of what may be
        seen (batch, length, length) to hidden states (batch, length, hidden)."""
        angles = positions[self.axes].permute(1, 2, 0).float() * self.frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        hidden = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, _MASKED)[:, None]
        for layer in self.layers:
            x = layer(x, cos, sin, hidden)
        result: Tensor = self.norm(x)
        return result


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

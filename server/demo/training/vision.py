"""The vision encoder of Qwen3-VL, for pictures of a batch that share one grid.

Shapes: patches are in the order of the tokens, the four of a token consecutive.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 16  # pixels
MERGE = 2  # patches of a token, along each side
CELL = PATCH * MERGE  # pixels of a token
FRAMES = 2  # frames of a patch
# Qwen's means and deviations, of 0 to 1. The shipped processor configuration has the same.
MEAN = (0.5, 0.5, 0.5)
DEVIATION = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder; names as in Transformers."""

    depth: int = 6
    hidden_size: int = 192
    intermediate_size: int = 768
    out_hidden_size: int = 192
    num_heads: int = 6
    in_channels: int = 3
    patch_size: int = PATCH
    spatial_merge_size: int = MERGE
    temporal_patch_size: int = FRAMES
    num_position_embeddings: int = 256
    deepstack_visual_indexes: list[int] = field(default_factory=list)
    hidden_act: str = "silu"


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
            weight = weight.sum(2)  # a picture counts as two equal frames
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
        like = self.pos_embed.weight
        mean, deviation = _normalization(patches.shape[-1], like.device)
        x = self.patch_embed(((patches.float() - mean) / deviation).to(like.dtype))
        interpolation, cos, sin = _grid_tables(
            grid, self.side, self.head_dim, like.dtype, like.device
        )
        x = x + interpolation @ self.pos_embed.weight
        for block in self.blocks:
            x = block(x, cos, sin)
        merged: Tensor = self.merger(x)
        return merged


@lru_cache(maxsize=4)
def _normalization(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, for values of 0 to 255, of each number of a patch; channels first."""
    each = width // 3
    mean, deviation = torch.tensor((MEAN, DEVIATION), device=device) * 255
    return mean.repeat_interleave(each), deviation.repeat_interleave(each)


def in_token_order(x: Tensor) -> Tensor:
    """(rows, columns, ...) of patches to (rows * columns, ...), the four of a token consecutive."""
    rows, columns, *rest = x.shape
    x = x.view(rows // MERGE, MERGE, columns // MERGE, MERGE, *rest)
    return x.transpose(1, 2).reshape(rows * columns, *rest)


@lru_cache(maxsize=512)
def _grid_tables(
    grid: tuple[int, int], side: int, head_dim: int, dtype: torch.dtype, device: torch.device
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
        in_token_order(weights.flatten(2)).to(device, dtype),
        angles.cos().to(device, dtype),
        angles.sin().to(device, dtype),
    )


def _interpolation(count: int, side: int) -> Tensor:
    """Linear weights of (count, side), corners on corners."""
    places = torch.linspace(0, side - 1, count)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)

"""Initial weights that encode what is known before training.

- Layers add nothing to the residual stream at first.
- Patches are embedded by whitened cosines, so fine strokes count as much as large areas
  (whitening as in the first layer of Keller Jordan's CIFAR-10 networks, 2024).
- Heads of the first vision layers look at a neighbor each, as a convolution does (compare Trockman
  and Kolter, Mimetic Initialization of Self-Attention Layers, 2023).
- Positions and coordinates start as Fourier features, so near ones are similar.
"""

import math
import random

import torch
from torch import Tensor

from server.demo.training.batches import patches
from server.demo.training.language import TextLayer
from server.demo.training.network import Network
from server.demo.training.objects import mosaic
from server.demo.training.texts import page
from server.demo.training.vision import CELL, FRAMES, PATCH, Vision, VisionBlock
from server.demo.training.vocabulary import COORDINATES

_GRAY, _CHROMA, _MOVING = 88, 40, 24  # filters: of gray, of each of two colors, of motion
_FLOOR = 0.1  # minimum deviation of a filter's output, to avoid amplifying noise
_SAMPLE = 200  # pictures
# Offset in patches (rows, columns) of the neighbor that each head looks at, by layer.
_NEIGHBORS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (-1, -1), (1, -1), (-1, 1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
)
_SHARPNESS = 25.0
_FREQUENCIES = 3  # of the rotary embedding; the others hardly rotate within a picture


@torch.no_grad()
def initialize(network: Network, seed: int) -> None:
    """Sets all weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.normal_(std=0.6 * parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
    for layer in network.model.language_model.layers:
        assert isinstance(layer, TextLayer)
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for block in network.model.visual.blocks:
        assert isinstance(block, VisionBlock)
        block.attn.proj.weight.zero_()
        block.mlp.linear_fc2.weight.zero_()
    _embed_patches(network.model.visual, random.Random(seed))
    _look_at_neighbors(network.model.visual)
    axis = torch.linspace(0, 1, network.model.visual.side)
    features = _fourier(torch.cartesian_prod(axis, axis), 4)
    places = network.model.visual.pos_embed.weight
    mixing = torch.randn(features.shape[1], places.shape[1], generator=generator)
    places.copy_(features @ mixing * 0.3 * features.shape[1] ** -0.5)
    words = network.model.language_model.embed_tokens.weight
    words.normal_(std=words.shape[1] ** -0.5, generator=generator)
    features = _fourier(torch.linspace(0, 1, len(COORDINATES))[:, None], 8)
    mixing = torch.randn(features.shape[1], words.shape[1], generator=generator)
    numbers = features @ mixing * (features.shape[1] * words.shape[1]) ** -0.5
    words[-len(COORDINATES) + 1 :] = numbers[1:]


def _fourier(places: Tensor, waves: int) -> Tensor:
    """Features (n, (1 + 2 * waves) * axes) of places (n, axes) from 0 to 1."""
    features = [2 * places - 1]
    for wave in range(1, waves + 1):
        features += [(math.pi * wave * places).cos(), (math.pi * wave * places).sin()]
    return torch.cat(features, 1)


def _cosines() -> Tensor:
    """The orthonormal basis (frequency, pixel) of the discrete cosine transform."""
    frequency = torch.arange(PATCH)[:, None].float()
    pixel = torch.arange(PATCH)[None].float()
    basis = torch.cos(math.pi * (pixel + 0.5) * frequency / PATCH) * math.sqrt(2 / PATCH)
    basis[0] /= math.sqrt(2)
    return basis


def _embed_patches(vision: Vision, rng: random.Random) -> None:
    basis = _cosines()
    colors = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    colors /= colors.norm(dim=1, keepdim=True)
    lowest = sorted((u * u + v * v, u, v) for u in range(PATCH) for v in range(PATCH))

    def filters(color: int, count: int) -> list[Tensor]:
        return [
            colors[color][:, None, None] * basis[u][:, None] * basis[v][None]
            for _, u, v in lowest[:count]
        ]

    still = torch.stack([*filters(0, _GRAY), *filters(1, _CHROMA), *filters(2, _CHROMA)])
    moving = torch.stack(filters(0, _MOVING))
    grid = (4, 4)
    size = (grid[1] * CELL, grid[0] * CELL)
    pictures = [(page, mosaic)[index % 2](rng, size) for index in range(_SAMPLE)]
    seen = torch.cat([patches(picture.frames, grid) for picture in pictures]).float() / 127.5 - 1
    given = torch.einsum("ncij,kcij->nk", seen.view(-1, 3, PATCH, PATCH), still)
    deviation = (given.var(0) + _FLOOR**2).sqrt()
    projection = vision.patch_embed.proj
    assert projection.bias is not None
    count = len(still)
    projection.weight[:count] = (still / deviation[:, None, None, None] / FRAMES)[:, :, None]
    projection.weight[count:, :, 0] = moving / deviation[: len(moving), None, None, None]
    projection.weight[count:, :, 1] = -projection.weight[count:, :, 0]
    projection.bias[:count] = -given.mean(0) / deviation


def _look_at_neighbors(vision: Vision) -> None:
    """Sets biases of queries and keys so that attention is highest at each head's offset."""
    dim = vision.head_dim
    frequencies = 10000.0 ** (-torch.arange(0, dim // 2, 2).float() / (dim // 2))
    size = math.sqrt(_SHARPNESS)
    for block, neighbors in zip(vision.blocks, _NEIGHBORS, strict=False):
        assert isinstance(block, VisionBlock)
        query, key, _ = block.attn.qkv.bias.view(3, -1, dim)
        for head, offset in enumerate(neighbors):
            for axis, steps in enumerate(offset):
                for wave in range(_FREQUENCIES):
                    pair = axis * (dim // 4) + wave
                    angle = float(frequencies[wave]) * steps
                    key[head, pair] = size
                    query[head, pair] = size * math.cos(angle)
                    query[head, pair + dim // 2] = -size * math.sin(angle)

"""The language model of Qwen3-VL."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.demo.training import vocabulary
from server.demo.training.vision import attend, rotate

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
        # The query heads that share a key head are computed as one head with more queries, so no
        # key is repeated.
        grouped = rotate(query, cos, sin).reshape(batch, self.shared, -1, query.shape[-1])
        repeated = mask.repeat(1, 1, self.heads // self.shared, 1)
        mixed = attend(grouped, rotate(key, cos, sin), value, repeated)
        mixed = mixed.view(batch, self.heads, length, -1).transpose(1, 2)
        result: Tensor = self.o_proj(mixed.reshape(batch, length, -1))
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
        self.theta: float = config.rope_parameters["rope_theta"]
        self.register_buffer("axes", axes, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (batch, length, hidden): those of the last layer and those halfway.

        Takes embeddings (batch, length, hidden), positions int64 (3, batch, length) and a mask
        bool (batch, length, length) of the tokens that each token attends to.
        """
        pairs = torch.arange(len(self.axes), device=x.device)  # float32 in a bfloat16 network
        frequencies = self.theta ** (-pairs.float() / len(self.axes))
        angles = positions[self.axes].permute(1, 2, 0).float() * frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        hidden = x.new_zeros(mask.shape).masked_fill_(~mask, _MASKED)[:, None]
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], cos, sin, hidden))
        return self.norm(states[-1]), states[len(self.layers) // 2]

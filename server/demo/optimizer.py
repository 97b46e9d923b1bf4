"""Muon for the matrices within the network, AdamW for the rest; weights in float32.

The network computes in bfloat16 with a copy of the weights. Muon: Keller Jordan et al., 2024
(https://kellerjordan.github.io/posts/muon/), here for all matrices of one shape at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.02
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_SLOW = 0.1  # share of the rate for the embedding of patches, which starts near its end
_NOT_MUON = ("embed", "merger.linear_fc1", "facts", "mentioned")


class Optimizer:
    """Keeps float32 weights of a bfloat16 network."""

    def __init__(self, network: nn.Module, muon_rate: float, adam_rate: float) -> None:
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        self.parameters = dict(network.named_parameters())
        self.weights = {
            name: parameter.detach().float().clone() for name, parameter in self.parameters.items()
        }
        self.average = {name: weight.clone() for name, weight in self.weights.items()}
        self.groups: dict[tuple[int, ...], list[str]] = {}
        rest = []
        for name, weight in self.weights.items():
            if weight.ndim == 2 and not any(part in name for part in _NOT_MUON):
                self.groups.setdefault(tuple(weight.shape), []).append(name)
            else:
                rest.append(name)
        self.rest = rest
        self.momentum = {
            shape: torch.zeros(len(names), *shape) for shape, names in self.groups.items()
        }
        slow = [name for name in rest if "patch_embed" in name]
        fast = [name for name in rest if name not in slow]
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.weights[name] for name in fast], "share": 1.0},
                {"params": [self.weights[name] for name in slow], "share": _SLOW},
            ],
            lr=adam_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            foreach=True,
        )

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float, decay: float) -> None:
        """One step, at a share of the rates; `decay` is that of the average of the weights."""
        for shape, names in self.groups.items():
            gradient = torch.stack([gradients[name] for name in names])
            momentum = self.momentum[shape]
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, _MOMENTUM))
            step = self.muon_rate * rate
            scale = step * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, change in zip(names, update, strict=True):
                self.weights[name].mul_(1 - step * _WEIGHT_DECAY).add_(change, alpha=-scale)
        for name in self.rest:
            self.weights[name].grad = gradients[name]
        nn.utils.clip_grad_norm_([self.weights[name] for name in self.rest], 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * rate * group["share"]
        self.adam.step()
        for name, weight in self.weights.items():
            self.average[name].lerp_(weight, 1 - decay)
            self.parameters[name].copy_(weight)

    def state(self) -> dict[str, Any]:
        """What must be kept to go on."""
        return {
            "weights": self.weights,
            "average": self.average,
            "momentum": self.momentum,
            "adam": self.adam.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
            self.average[name].copy_(state["average"][name])
            self.parameters[name].copy_(weight)
        for shape, momentum in self.momentum.items():
            momentum.copy_(state["momentum"][shape])
        self.adam.load_state_dict(state["adam"])


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1, of (n, rows, columns), in float32."""
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT.contiguous()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    result: Tensor = (x if wide else x.mT).float()
    return result

"""Muon for the matrices within the network, AdamW for the rest; weights in float32.

The network computes with a copy of the weights, in bfloat16 where that is fast. Muon: Keller Jordan
et al., 2024 (https://kellerjordan.github.io/posts/muon/), here for all matrices of one shape at a
time.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.02
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_SLOW = 0.1  # factor of the rate for the embedding of patches, which starts near its final value
_ALIGNED = 32  # elements: other sizes come last, since kernels are faster on aligned parts
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # by architecture
_NOT_MUON = ("embed", "merger.linear_fc1", "facts", "mentioned")


class Optimizer:
    """Keeps float32 weights of a network that computes in `compute_dtype`.

    All parameters are parts of one vector, those of Muon first and matrices of one shape together,
    so one operation updates them all.
    """

    def __init__(self, network: nn.Module, muon_rate: float, adam_rate: float) -> None:
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        named = dict(network.named_parameters())
        groups: dict[torch.Size, list[str]] = {}
        fast: list[str] = []
        slow: list[str] = []
        for name, parameter in named.items():
            if parameter.ndim == 2 and not any(part in name for part in _NOT_MUON):
                groups.setdefault(parameter.shape, []).append(name)
            else:
                (slow if "patch_embed" in name else fast).append(name)
        fast.sort(key=lambda name: named[name].numel() % _ALIGNED)
        names = [name for group in (*groups.values(), slow, fast) for name in group]
        self.parameters = {name: named[name] for name in names}
        self.rounded = torch.cat([it.detach().reshape(-1) for it in self.parameters.values()])
        for name, part in self.named(self.rounded).items():
            named[name].data = part
        self.weights = self.rounded.float()
        self.average = self.weights.clone()
        self.gradients = torch.zeros_like(self.weights)
        shapes = [torch.Size((len(group), *shape)) for shape, group in groups.items()]
        sizes = [shape.numel() for shape in shapes]
        self.momentum = torch.zeros_like(self.weights[: sum(sizes)])

        def matrices(flat: Tensor) -> list[Tensor]:
            parts = torch.split(flat[: sum(sizes)], sizes)
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        flats = self.weights, self.gradients, self.momentum
        self.muon = list(zip(*map(matrices, flats), strict=True))
        ends = sum(sizes), sum(sizes) + sum(named[name].numel() for name in slow)
        self.rest = self.weights.tensor_split(ends)[1:]
        for weights, gradients in zip(
            self.rest, self.gradients.tensor_split(ends)[1:], strict=True
        ):
            weights.grad = gradients
        self.adam = torch.optim.AdamW(
            [
                {"params": [weights], "share": share}
                for weights, share in zip(self.rest, (_SLOW, 1.0), strict=True)
            ],
            lr=adam_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a vector of all parameters, in their shapes."""
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters.values()])
        return {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }

    def collect(self) -> Tensor:
        """Moves the network's gradients into one float32 vector, for the next step."""
        given = [
            torch.zeros_like(it) if it.grad is None else it.grad for it in self.parameters.values()
        ]
        self.gradients.copy_(torch.cat([it.reshape(-1) for it in given]))
        for parameter in self.parameters.values():
            parameter.grad = None
        return self.gradients

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """One step; `rate` scales the learning rates, `decay` is that of the average weights."""
        step = self.muon_rate * rate
        for weights, gradient, momentum in self.muon:
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, _MOMENTUM))
            scale = step * max(1.0, weights.shape[1] / weights.shape[2]) ** 0.5
            weights.mul_(1 - step * _WEIGHT_DECAY).add_(update, alpha=-scale)
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * rate * group["share"]
        self.adam.step()
        self.average.lerp_(self.weights, 1 - decay)
        self.rounded.copy_(self.weights)

    def state(self) -> dict[str, Any]:
        """The state from which `load` continues."""
        return {
            "weights": self.weights,
            "average": self.average,
            "momentum": self.momentum,
            "adam": self.adam.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self.weights.copy_(state["weights"])
        self.average.copy_(state["average"])
        self.momentum.copy_(state["momentum"])
        self.rounded.copy_(self.weights)
        self.adam.load_state_dict(state["adam"])


@functools.cache
def compute_dtype(device: str) -> torch.dtype:
    """What the network computes in: bfloat16, except on a CPU without instructions for it, where
    float32 is several times as fast."""
    if device != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in _BFLOAT16):
        return torch.bfloat16
    return torch.float32


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values near 1, of (n, rows, columns), in float32."""
    x = matrices.to(compute_dtype(matrices.device.type))
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT.contiguous()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).to(x.dtype) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    result: Tensor = (x if wide else x.mT).float()
    return result

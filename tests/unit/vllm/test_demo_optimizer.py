"""The optimizer of the demo model: one vector holds all weights, each updated on its own."""

import torch
from torch import Tensor, nn

from server.demo.training.optimizer import Optimizer, orthogonal

MATRICES = ("one.weight", "other.weight")
MUON, ADAM, DECAY = 0.02, 0.02, 0.9
CLOSE = 1e-3  # matrices are orthogonalized in bfloat16


class Small(nn.Module):
    """Two matrices of equal shape for Muon, two embeddings, and vectors of odd lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(5))
        self.one = nn.Linear(32, 64)
        self.embed = nn.Embedding(7, 32)
        self.other = nn.Linear(32, 64)
        self.patch_embed = nn.Linear(16, 32)


def muon(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonal((0.05 * gradient + 0.95 * momentum)[None])[0]
        weight = weight * (1 - MUON * 0.02) - MUON * 2**0.5 * update
    return weight


def test_each_weight_is_updated_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    network = Small().bfloat16()
    begun = {name: it.detach().float().clone() for name, it in network.named_parameters()}
    optimizer = Optimizer(network, MUON, ADAM)
    gradients: dict[str, list[Tensor]] = {name: [] for name in begun}
    adams = {
        name: it.clone().requires_grad_() for name, it in begun.items() if name not in MATRICES
    }
    slow = [it for name, it in adams.items() if "patch_embed" in name]
    fast = [it for name, it in adams.items() if "patch_embed" not in name]
    adam = torch.optim.AdamW(
        [{"params": fast, "lr": ADAM}, {"params": slow, "lr": 0.1 * ADAM}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    average = begun
    for step in range(3):
        for name, parameter in network.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name].append(parameter.grad.float())
        if step == 1:  # a weight that a batch did not use
            network.gain.grad = None
            gradients["gain"][-1].zero_()
        optimizer.collect()
        optimizer.step(1.0, DECAY)
        for name, weight in adams.items():
            weight.grad = gradients[name][-1].clone()
        nn.utils.clip_grad_norm_(adams.values(), 1.0)
        adam.step()
        muons = {name: muon(begun[name], gradients[name]) for name in MATRICES}
        expected = {name: it.detach() for name, it in (adams | muons).items()}
        average = {name: DECAY * average[name] + (1 - DECAY) * expected[name] for name in begun}
        weights = optimizer.named(optimizer.weights)
        assert weights.keys() == expected.keys() == begun.keys()
        for name, parameter in network.named_parameters():
            assert torch.allclose(weights[name], expected[name], atol=CLOSE)
            assert torch.allclose(
                optimizer.named(optimizer.average)[name], average[name], atol=CLOSE
            )
            assert parameter.equal(weights[name].bfloat16())
            assert parameter.grad is None
    assert not any(torch.allclose(begun[name], it, atol=2 * CLOSE) for name, it in expected.items())

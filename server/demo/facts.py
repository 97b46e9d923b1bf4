"""The auxiliary loss: each vision token says what is at its place, in the language model's words.

A head per fact turns a vision token into a vector, and its product with the embeddings of the words
for that fact are the logits. The embeddings are the language model's own, so that what the encoder
learns is at once in the form in which the language model says it. The heads are not shipped.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.demo.targets import FACTS, UNKNOWN
from server.demo.vocabulary import COORDINATES, Codec

COORDINATE_FACTS = ("x0", "y0", "x1", "y1")
# Facts of which "nothing" is not learned: they are asked only of tokens that have them.
_ONLY_WHERE_KNOWN = (*COORDINATE_FACTS, "row", "column")
_NOTHING_WEIGHT = 0.1  # most tokens have nothing: their share of the loss is lowered
_WEIGHTS = {
    "char": 2.0,
    "next": 1.0,
    "index": 1.0,
    "color": 0.7,
    "shape": 0.7,
    "rank": 0.7,
} | dict.fromkeys(COORDINATE_FACTS, 0.15)
_WEIGHT = 0.4
_BLUR = 1.5  # steps: how far a coordinate's target spreads


class Facts(nn.Module):
    """The heads."""

    def __init__(self, codec: Codec, width: int) -> None:
        super().__init__()
        self.heads = nn.Linear(width, width * len(FACTS), bias=False)
        self.nothing = nn.Parameter(torch.zeros(len(FACTS), width))
        self.scale = nn.Parameter(torch.ones(len(FACTS)) * 2)
        self.words = {
            fact: [torch.tensor(codec.word(word)) for word in words]
            for fact, words in FACTS.items()
        }

    @torch.no_grad()
    def initialize(self) -> None:
        """Each head starts as the identity."""
        width = self.heads.in_features
        self.heads.weight.copy_(torch.eye(width).repeat(len(FACTS), 1))

    def forward(
        self, seen: Tensor, facts: dict[str, Tensor], embeddings: Tensor
    ) -> dict[str, Tensor]:
        """The loss of each fact that occurs, from vision tokens (batch, tokens, width), targets
        (batch, tokens) of each fact and the embeddings (vocabulary, width)."""
        width = seen.shape[-1]
        tokens = functional.rms_norm(seen, (width,)).reshape(-1, width)
        weights = self.heads.weight.view(len(FACTS), width, width)
        losses = {}
        for number, fact in enumerate(FACTS):
            target = facts[fact].reshape(-1)
            learned = target > 0 if fact in _ONLY_WHERE_KNOWN else target != UNKNOWN
            if not (target > 0).any():
                continue
            target = target[learned]
            vectors = functional.linear(tokens[learned], weights[number])
            words = torch.stack([embeddings[ids].mean(0) for ids in self.words[fact]])
            words = torch.cat((self.nothing[number : number + 1], words))
            logits = (vectors @ words.T).float() * self.scale[number].float()
            losses[fact] = _loss(fact, logits, target)
        return losses


def _loss(fact: str, logits: Tensor, target: Tensor) -> Tensor:
    if fact in COORDINATE_FACTS:
        steps = torch.arange(len(COORDINATES))
        distance = (steps - (target - 1)[:, None]).abs()
        blurred = functional.softmax(-distance / _BLUR, -1)
        return functional.cross_entropy(logits[:, 1:], blurred)
    weight = torch.ones(logits.shape[1])
    weight[0] = _NOTHING_WEIGHT
    return functional.cross_entropy(logits, target, weight)


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the losses by their weights."""
    return torch.stack([loss * _WEIGHTS.get(fact, _WEIGHT) for fact, loss in losses.items()]).sum()

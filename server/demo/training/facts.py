"""The auxiliary losses: tokens predict what they stand for, in the language model's embeddings.

Each vision token predicts what is at its place. Each name in a question predicts, halfway through
the language model, what it names. A head per fact turns a token into a vector; the logits are its
products with the embeddings of the words for that fact. These are the language model's own, so the
features have the form that the language model needs. The heads are not shipped.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.demo.training.targets import UNKNOWN
from server.demo.training.vocabulary import COORDINATES, Codec

COORDINATE_FACTS = ("x0", "y0", "x1", "y1")
# Facts without a class "nothing": only tokens that have them predict them.
_ONLY_WHERE_KNOWN = (*COORDINATE_FACTS, "row", "column")
_NOTHING_WEIGHT = 0.1  # most tokens have nothing, so they weigh less in the loss
_WEIGHTS = {
    "char": 2.0,
    "next": 1.0,
    "index": 1.0,
    "color": 0.7,
    "shape": 0.7,
    "rank": 0.7,
} | dict.fromkeys(COORDINATE_FACTS, 0.3)
_WEIGHT = 0.4
_BLUR = 1.5  # steps over which a coordinate's target spreads


class Facts(nn.Module):
    """The heads of some facts, each with its words."""

    means: Tensor

    def __init__(self, codec: Codec, width: int, facts: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.facts = tuple(facts)
        self.counts = [len(words) for words in facts.values()]
        self.heads = nn.Linear(width, width * len(facts), bias=False)
        self.nothing = nn.Parameter(torch.zeros(len(facts), width))
        self.scale = nn.Parameter(torch.ones(len(facts)) * 2)
        means = torch.zeros(sum(self.counts), codec.size)
        for row, word in enumerate(word for words in facts.values() for word in words):
            ids = codec.word(word)
            means[row, ids] = 1 / len(ids)
        self.register_buffer("means", means, persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Each head starts as the identity."""
        width = self.heads.in_features
        self.heads.weight.copy_(torch.eye(width).repeat(len(self.facts), 1))

    def forward(self, hidden: Tensor, targets: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        """The loss of each fact that occurs in the targets.

        Takes hidden states (..., width), targets int64 (facts, ...) and embeddings (vocabulary,
        width).
        """
        width = hidden.shape[-1]
        tokens = functional.rms_norm(hidden, (width,)).reshape(-1, width)
        heads = self.heads.weight.view(-1, width, width).unbind(0)
        words = torch.split(self.means @ embeddings, self.counts)
        nothing, scale = self.nothing[:, None].unbind(0), self.scale.float().unbind(0)
        occurs = (targets > 0).flatten(1).any(1).tolist()
        losses = {}
        for number, fact in enumerate(self.facts):
            if not occurs[number]:
                continue
            asked, target = tokens, targets[number].reshape(-1)
            if fact in _ONLY_WHERE_KNOWN:
                known = target > 0
                asked, target = tokens[known], target[known]
            vectors = functional.linear(asked, heads[number])
            logits = functional.linear(vectors, torch.cat((nothing[number], words[number])))
            losses[fact] = _loss(fact, logits.float() * scale[number], target)
        return losses


def _loss(fact: str, logits: Tensor, target: Tensor) -> Tensor:
    if fact in COORDINATE_FACTS:
        return functional.cross_entropy(logits[:, 1:], blurred(target - 1, len(COORDINATES)))
    weight = logits.new_ones(logits.shape[1])
    weight[0] = _NOTHING_WEIGHT
    return functional.cross_entropy(logits, target, weight, ignore_index=UNKNOWN)


def blurred(target: Tensor, count: int) -> Tensor:
    """Coordinates (n,) as target probabilities (n, count), which neighbors share."""
    distance = (torch.arange(count, device=target.device) - target[:, None]).abs()
    return functional.softmax(-distance / _BLUR, -1)


def total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the losses; only the last word of a fact's name chooses its weight."""
    return torch.stack(
        [loss * _WEIGHTS.get(fact.split()[-1], _WEIGHT) for fact, loss in losses.items()]
    ).sum()

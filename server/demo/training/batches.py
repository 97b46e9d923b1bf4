"""Batches of examples as tensors: patches, tokens, attention masks and facts.

The pictures of a batch share one grid, so none is padded. Several questions about a picture share
its prefix: each is a branch that sees the prefix and itself, at the positions it would have alone.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from server.demo.training import vocabulary
from server.demo.training.examples import Example
from server.demo.training.pictures import Picture
from server.demo.training.targets import FACTS, MENTIONED, Grid, known, mentioned
from server.demo.training.vision import CELL, MERGE, PATCH, in_token_order
from server.demo.training.writing import write


@dataclass(slots=True)
class Batch:
    """Examples of one form: B examples, T tokens, V vision tokens, M mentions."""

    pictures: list[tuple[Tensor, Grid]]  # uint8 patches (B, patches, pixels of a patch)
    ids: Tensor  # int64 (B, T)
    positions: Tensor  # int64 (3, B, T): time, row, column
    branches: Tensor  # int64 (B, T): 0 the prefix, -1 padding
    weights: Tensor  # float32 (B, T): of answers; 0 elsewhere
    facts: Tensor  # int64 (len(FACTS), B, V)
    answers: list[tuple[int, str, int, int]]  # example, task, start and end in T
    mentions: Tensor  # int64 (2, M): examples, places in T
    mentioned: Tensor  # int64 (len(MENTIONED), M): the facts of what is mentioned

    @property
    def mask(self) -> Tensor:
        """bool (B, T, T): which tokens each token attends to."""
        branches = self.branches
        mask = branches[:, None, :] == branches[:, :, None]
        return (mask | (branches[:, None, :] == 0)).tril()

    def to(self, device: torch.device) -> "Batch":
        """A copy on a device."""
        return Batch(
            [(seen.to(device), grid) for seen, grid in self.pictures],
            self.ids.to(device),
            self.positions.to(device),
            self.branches.to(device),
            self.weights.to(device),
            self.facts.to(device),
            self.answers,
            self.mentions.to(device),
            self.mentioned.to(device),
        )


def joined(parts: list[Batch]) -> Batch:
    """Concatenates batches of the same grids and kind."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.ids.shape[1] for part in parts)
    firsts = list(itertools.accumulate((len(part.ids) for part in parts[:-1]), initial=0))

    def padded(name: str, dim: int, value: int = 0) -> Tensor:
        each = [getattr(part, name) for part in parts]
        wide = [functional.pad(it, (0, length - it.shape[-1]), value=value) for it in each]
        return torch.cat(wide, dim)

    return Batch(
        [
            (torch.cat([seen for seen, _ in same]), same[0][1])
            for same in zip(*(part.pictures for part in parts), strict=True)
        ],
        padded("ids", 0),
        padded("positions", 1),
        padded("branches", 0, -1),
        padded("weights", 0),
        torch.cat([part.facts for part in parts], 1),
        [
            (first + example, task, start, end)
            for first, part in zip(firsts, parts, strict=True)
            for example, task, start, end in part.answers
        ],
        torch.cat(
            [
                part.mentions + torch.tensor([[first], [0]])
                for first, part in zip(firsts, parts, strict=True)
            ],
            1,
        ),
        torch.cat([part.mentioned for part in parts], 1),
    )


def patches(frames: list[Image.Image], grid: Grid) -> Tensor:
    """uint8 (patches, 3 * frames * 16 * 16) of one frame or two, in the order of the tokens."""
    rows, columns = grid
    size = columns * CELL, rows * CELL
    pixels = np.stack(
        [
            np.asarray(
                frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC)
            )
            for frame in frames
        ]
    )
    cut = torch.from_numpy(pixels).view(len(frames), rows * MERGE, PATCH, columns * MERGE, PATCH, 3)
    return in_token_order(cut.permute(1, 3, 5, 0, 2, 4).flatten(2).contiguous())


def collate(
    codec: vocabulary.Codec, rng: random.Random, examples: list[Example], grids: list[Grid]
) -> Batch:
    """A batch of examples. Each has one picture per grid, or a clip with a pair of frames per grid.
    Examples without questions contribute only pictures and facts."""
    fps = rng.choice([1.0, 2.0, 4.0, 5.0, 8.0, 10.0, 24.0])
    written = [write(codec, rng, example, grids, fps) for example in examples if example.questions]
    length = max((len(writer.ids) for writer in written), default=0)
    count = len(written)
    ids = np.zeros((count, length), np.int64)
    positions = np.zeros((3, count, length), np.int64)
    branches = np.full((count, length), -1, np.int64)
    weights = np.zeros((count, length), np.float32)
    answers = []
    places: list[tuple[int, int]] = []
    named: list[list[int]] = []
    for row, writer in enumerate(written):
        end = len(writer.ids)
        ids[row, :end] = writer.ids
        positions[:, row, :end] = np.array(writer.positions).T
        branches[row, :end] = writer.branches
        weights[row, :end] = writer.weights
        answers += [(row, *answer) for answer in writer.answers]
        places += [(row, place) for place, _ in writer.mentions]
        named += [list(mentioned(known_of).values()) for _, known_of in writer.mentions]
    parts = [[_part(example, index) for example in examples] for index in range(len(grids))]
    facts = torch.zeros(len(FACTS), len(examples), 0, dtype=torch.long)
    if grids:
        each = [
            np.stack([list(known(picture, grid).values()) for picture in part], 1)
            for part, grid in zip(parts, grids, strict=True)
        ]
        facts = torch.from_numpy(np.concatenate(each, 2))
    return Batch(
        [
            (torch.stack([patches(picture.frames, grid) for picture in part]), grid)
            for part, grid in zip(parts, grids, strict=True)
        ],
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(branches),
        torch.from_numpy(weights),
        facts,
        answers,
        torch.tensor(places, dtype=torch.long).reshape(-1, 2).T,
        torch.tensor(named, dtype=torch.long).reshape(-1, len(MENTIONED)).T,
    )


def _part(example: Example, index: int) -> Picture:
    """A picture of an example, or a pair of frames of its clip."""
    if not example.clip:
        return example.pictures[index]
    (clip,) = example.pictures
    pair = slice(2 * index, 2 * index + 2)
    things = [thing for thing in clip.things if thing.frame == pair.start]
    return Picture(clip.frames[pair], clip.facts, things)

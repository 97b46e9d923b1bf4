"""The demo model's training code and Transformers, run on the same conversations."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from server.demo.training import phrases
from server.demo.training.batches import collate
from server.demo.training.examples import Example
from server.demo.training.network import Network
from server.demo.training.targets import Grid
from server.demo.training.vocabulary import Codec

FPS = 2.0


class Chance(random.Random):
    """Every coin falls on the same side, and `choice` returns the second item."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.heads = heads

    def random(self) -> float:
        return 0.0 if self.heads else 0.99

    def choice(self, seq: Any) -> Any:
        return seq[1]  # FPS among the frame rates


@dataclass
class Twins:
    """Both models, loaded from a folder written by `server.demo.training.checkpoint`."""

    folder: Path
    network: Network = field(init=False)
    theirs: Any = field(init=False)
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.network = Network()
        weights = load_file(self.folder / "model.safetensors")
        self.network.load_state_dict({name: weight.float() for name, weight in weights.items()})
        self.theirs = Qwen3VLForConditionalGeneration.from_pretrained(
            self.folder, dtype=torch.float32
        )
        self.processor = AutoProcessor.from_pretrained(self.folder)

    def inputs(self, example: Example, *, worded: bool) -> dict[str, Tensor]:
        """The inputs that Transformers builds from an example of one question.

        `worded`: with a system message first, and with the question before the pictures.
        """
        (question,) = example.questions
        text = {"type": "text", "text": question.text}
        kind = "video" if example.clip else "image"
        shown = [{"type": kind} for _ in example.pictures]
        messages = [{"role": "user", "content": [text, *shown] if worded else [*shown, text]}]
        if worded:
            messages.insert(0, {"role": "system", "content": phrases.SYSTEM[1]})
        prompt = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        if not example.clip:
            images = [picture.image for picture in example.pictures]
            return dict(self.processor(text=[prompt], images=images, return_tensors="pt"))
        (clip,) = example.pictures
        frames = np.stack([np.asarray(frame) for frame in clip.frames]).transpose(0, 3, 1, 2)
        count = len(frames)
        metadata = {"fps": FPS, "frames_indices": list(range(count)), "total_num_frames": count}
        return dict(
            self.processor(
                text=[prompt],
                videos=[frames],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
        )

    @torch.no_grad()
    def compare(
        self, codec: Codec, example: Example, grids: list[Grid], *, worded: bool = False
    ) -> tuple[list[int], list[int], Tensor, Tensor]:
        """Ids and logits (length, vocabulary) of the prompt: from training, from Transformers."""
        batch = collate(codec, Chance(worded), [example], grids)
        hidden, _ = self.network.read(
            batch.ids, self.network.see(batch.pictures), batch.positions, batch.mask
        )
        logits = hidden[0] @ self.network.model.language_model.embed_tokens.weight.T
        inputs = self.inputs(example, worded=worded)
        theirs = inputs["input_ids"][0].tolist()
        ours = batch.ids[0, : len(theirs)].tolist()
        return ours, theirs, logits[: len(theirs)], self.theirs(**inputs).logits[0]

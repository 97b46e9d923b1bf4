"""The files of a training run: log, state, model and learning curve."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from server.demo.training import checkpoint
from server.demo.training.batches import Batch
from server.demo.training.optimizer import Optimizer

LOG, STATE = "log.jsonl", "state.pt"
SAVE_EVERY_S = 240


class Tally:
    """Losses and numbers of right answers since the last line of the log."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = defaultdict(list)
        self.answers: dict[str, list[bool]] = defaultdict(list)

    def add(self, batch: Batch, loss: Tensor, facts: dict[str, Tensor], right: Tensor) -> None:
        names = [*(("answers",) if batch.answers else ()), *facts]
        values = torch.stack([*((loss,) if batch.answers else ()), *facts.values()])
        for name, value in zip(names, values.tolist(), strict=True):
            self.losses[name].append(value)
        right = right.cpu()
        for example, task, start, end in batch.answers:
            self.answers[task].append(bool(right[example, start - 1 : end - 1].all()))

    def summary(self) -> dict[str, Any]:
        return {
            "losses": {name: sum(values) / len(values) for name, values in self.losses.items()},
            "right": {
                task: [sum(values), len(values)] for task, values in sorted(self.answers.items())
            },
        }


class Record:
    """A run's folder: log, state, model and learning curve."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, first: int, spent: float) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.started = time.monotonic() - spent
        self.last_saved = time.monotonic()
        self.tally = Tally()
        self._cut(first)

    def _cut(self, step: int) -> None:
        """Removes lines of the log after a step, because those steps are repeated."""
        log = self.folder / LOG
        if log.exists():
            whole = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
            log.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))

    def write(self, step: int, optimizer: Optimizer, *, last: bool) -> None:
        """Writes a line of the log; every few minutes, and at the end, also saves the state."""
        seconds = time.monotonic() - self.started
        line = {"step": step, "seconds": round(seconds, 1), **self.tally.summary()}
        self.tally = Tally()
        with (self.folder / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")
        if not last and time.monotonic() - self.last_saved <= SAVE_EVERY_S:
            return
        self.last_saved = time.monotonic()
        state = {
            "step": step,
            "seconds": seconds,
            "tokenizer": self.tokenizer.to_str(),
            "optimizer": optimizer.state(),
        }
        partial = self.folder / "state.partial"  # so that the state is replaced atomically
        torch.save(state, partial)
        partial.replace(self.folder / STATE)
        checkpoint.save(optimizer.named(optimizer.average), self.tokenizer, self.folder / "model")
        checkpoint.draw_learning_curve(self.folder / LOG)

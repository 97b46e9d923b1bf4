"""Trains the demo model from scratch: ``python -m server.demo.training.train --output DIR``.

Two single-threaded processes each compute the gradients of half of each batch, which is the fastest
way on two cores. With ``--device cuda``, one process computes all gradients, and others draw the
batches. The results are DIR/model, which can be served, and DIR/learning_curve.png. SIGINT and
SIGTERM save the state and end the run early; the same command continues from the last saved state,
on any device. The pictures depend only on the seed, steps, budget and number of shares. Two runs on
a CPU with the same options give the same weights, interrupted or not.
"""

import argparse
import math
import os
import random
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from server.demo.training import vocabulary
from server.demo.training.batches import Batch, joined
from server.demo.training.curriculum import draw
from server.demo.training.facts import Facts, blurred, total
from server.demo.training.initial import initialize
from server.demo.training.language import TextLayer
from server.demo.training.network import Network
from server.demo.training.optimizer import Optimizer, compute_dtype
from server.demo.training.record import STATE, Record
from server.demo.training.targets import FACTS, MENTIONED
from server.demo.training.vision import VisionBlock
from server.demo.training.vocabulary import COORDINATES

STEPS = 7_000  # of 1.1 to 1.6 seconds on two cores, about 2:50 hours
SHARES = 4  # of a batch, each drawn from its own seed
BUDGET = 10_000.0  # cost of a share, see curriculum.cost
PROCESSES = {"cpu": 2, "cuda": 1}  # compute processes by device
SEED = 1
MUON_RATE, ADAM_RATE = 0.008, 1.5e-3
WARM_UP = 60  # steps
CONSTANT, FALL = 0.3, 1.5  # the rate falls after this share of the steps, as this power of the rest
AVERAGE_DECAY = 0.995  # of the average of the weights that is shipped
FACTS_WEIGHT = 0.5
FACTS_FADE = 0.2  # the facts' weight at the end, as a share of that at the start
LOG_EVERY = 20  # steps
MENTION = "mentioned "  # before the facts of names, in the log


@dataclass(frozen=True)
class Options:
    """Options of a run; see `--help`."""

    output: Path
    steps: int = STEPS
    budget: float = BUDGET
    seed: int = SEED
    shares: int = SHARES
    weights: Path | None = None
    first_step: int = 0
    device: str = "cpu"
    processes: int = PROCESSES["cpu"]
    drawers: int = 0
    log_every: int = LOG_EVERY
    compile: bool = True


class Draws(Dataset[Batch]):
    """The batches of one compute process, by step."""

    def __init__(self, codec: vocabulary.Codec, options: Options, rank: int) -> None:
        self.codec, self.options = codec, options
        self.shares = range(rank, options.shares, options.processes)

    def __getitem__(self, step: int) -> Batch:
        seed, progress = f"{self.options.seed} {step}", step / self.options.steps
        return joined(
            [
                draw(
                    self.codec,
                    random.Random(f"{seed} {share}"),
                    random.Random(seed),
                    progress,
                    self.options.budget,
                )
                for share in self.shares
            ]
        )


class Trained(nn.Module):
    """The network and the heads of its auxiliary losses."""

    def __init__(self, codec: vocabulary.Codec) -> None:
        super().__init__()
        self.network = Network()
        width = self.network.text.hidden_size
        self.facts = Facts(codec, width, FACTS)
        self.mentioned = Facts(codec, width, MENTIONED)

    def initialize(self, seed: int) -> None:
        initialize(self.network, seed)
        self.facts.initialize()
        self.mentioned.initialize()

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of the answers, those of the facts, and which tokens are right (B, T - 1)."""
        network = self.network
        embeddings = network.model.language_model.embed_tokens.weight
        seen = network.see(batch.pictures) if batch.pictures else None
        losses = {} if seen is None else self.facts(seen, batch.facts, embeddings)
        if not batch.answers:
            return embeddings.new_zeros(()), losses, torch.zeros(0, 0)
        hidden, midway = network.read(batch.ids, seen, batch.positions, batch.mask)
        if batch.mentions.numel():
            examples, places = batch.mentions
            named = self.mentioned(midway[examples, places], batch.mentioned, embeddings)
            losses |= {f"{MENTION}{fact}": loss for fact, loss in named.items()}
        weights = batch.weights[:, 1:]
        answered = weights > 0
        logits = functional.linear(hidden[:, :-1][answered], embeddings).float()
        target = batch.ids[:, 1:][answered]
        each = _cross_entropy(logits, target)
        weight = weights[answered]
        right = torch.zeros_like(answered)
        right[answered] = logits.argmax(-1) == target
        return (each * weight).sum() / weight.sum(), losses, right


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of each token (n,). Of coordinates, those near the right one cost little."""
    each = functional.cross_entropy(logits, target, reduction="none")
    first = logits.shape[1] - len(COORDINATES) + 1
    (places,) = (target >= first).nonzero(as_tuple=True)
    if len(places):
        probabilities = logits[places].log_softmax(-1)[:, first:]
        near = blurred(target[places] - first, len(COORDINATES) - 1)
        each = each.index_copy(0, places, -(probabilities * near).sum(-1))
    return each


def rate(progress: float) -> float:
    """The factor of the learning rates at `progress`, from 0 to 1."""
    left: float = min(1.0, max(0.0, (1 - progress) / (1 - CONSTANT)))
    return math.pow(left, FALL)


def train(rank: int, options: Options, port: int) -> None:
    """Runs one compute process; gradients are averaged over all of them."""
    interruptions: list[int] = []  # no Event: a second signal within its set() would deadlock
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: interruptions.append(number))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sharp attention is full of them, and they are slow
    device = torch.device(options.device)
    if options.compile:
        _compile()
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=options.processes,
    )
    saved = options.output / STATE
    state = torch.load(saved, map_location="cpu", weights_only=True) if saved.exists() else None
    tokenizer = _tokenizer(options, state)
    codec = vocabulary.Codec(tokenizer)
    trained = Trained(codec)
    trained.initialize(options.seed)
    if options.weights:
        trained.network.load_state_dict(load_file(options.weights / "model.safetensors"))
    trained.to(device, compute_dtype(device.type))
    optimizer = Optimizer(trained, MUON_RATE, ADAM_RATE)
    first, spent = options.first_step, 0.0
    if state:
        optimizer.load(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    record = Record(options.output, tokenizer, first, spent) if rank == 0 else None
    steps = range(first, options.steps)
    draws = _loader(Draws(codec, options, rank), steps)
    for step, drawn in tqdm(
        zip(steps, draws, strict=True),
        initial=first,
        total=options.steps,
        disable=rank != 0,
        smoothing=0.02,
    ):
        batch = drawn.to(device)
        progress = step / options.steps
        loss, facts, right = trained(batch)
        faded = FACTS_WEIGHT * (1 - (1 - FACTS_FADE) * progress)
        (loss + faded * total(facts) if facts else loss).backward()
        gradients = optimizer.collect()
        if options.processes > 1:
            distributed.all_reduce(gradients)
            gradients /= options.processes
        decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
        warmed = min(1.0, (step - options.first_step + 1) / WARM_UP)
        optimizer.step(warmed * rate(progress), decay)
        stopping = _in_any(bool(interruptions))
        last = stopping or step + 1 == options.steps
        if record:
            record.tally.add(batch, loss, facts, right)
            if last or (step + 1) % options.log_every == 0:
                record.write(step + 1, optimizer, last=last)
        if stopping:
            break
    distributed.destroy_process_group()


def _loader(draws: Draws, steps: range) -> DataLoader[Batch]:
    """The batches of the steps in order, drawn by `options.drawers` other processes if not 0."""
    drawers = draws.options.drawers
    return DataLoader(
        draws,
        batch_size=None,
        sampler=steps,
        num_workers=drawers,
        multiprocessing_context="fork" if drawers else None,
        worker_init_fn=_leave_group,
    )


def _leave_group(_: int) -> None:
    """Shields a drawing process from Ctrl-C: it must outlive the compute process it serves."""
    os.setpgrp()


def _tokenizer(options: Options, state: dict[str, Any] | None) -> Tokenizer:
    """The tokenizer that the weights were trained with: the data's words may have changed since."""
    if state:
        return Tokenizer.from_str(state["tokenizer"])
    if options.weights:
        return Tokenizer.from_file(str(options.weights / "tokenizer.json"))
    return vocabulary.build()


def _compile() -> None:
    """Compiles the layers, which saves a third of the time."""
    for layer in (TextLayer, VisionBlock):
        compiled = torch.compile(layer.forward, dynamic=True)
        layer.forward = compiled  # type: ignore[method-assign]


def _in_any(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all of them end after the same step."""
    found = torch.tensor(int(flag))
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; a run that a signal ended exits with 128 plus its number."""
    parser = argparse.ArgumentParser(
        prog="python -m server.demo.training.train", description=__doc__
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--budget", type=float, default=BUDGET, help="cost of a share of a batch")
    parser.add_argument("--shares", type=int, default=SHARES, help="shares of a batch")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", choices=tuple(PROCESSES), default="cpu")
    parser.add_argument(
        "--processes",
        type=int,
        help="compute processes, all with as many shares (default: 2 on a CPU, 1 on a GPU)",
    )
    parser.add_argument(
        "--drawers",
        type=int,
        help="drawing processes per compute process; 0: it draws its batches itself (default: 0 "
        "on a CPU, all cores but one on a GPU)",
    )
    parser.add_argument(
        "--weights", type=Path, help="folder of a model to start from if its state is lost"
    )
    parser.add_argument("--first-step", type=int, default=0, help="first step with --weights")
    parser.add_argument(
        "--log-every", type=int, default=LOG_EVERY, help="steps per line of the log"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the layers; needs two minutes and a C++ compiler, or Triton on a GPU",
    )
    given = parser.parse_args(argv)
    if given.processes is None:
        given.processes = PROCESSES[given.device]
    if given.drawers is None:
        given.drawers = 0 if given.device == "cpu" else max(1, len(os.sched_getaffinity(0)) - 1)
    if given.shares % given.processes:
        parser.error("--shares must be a multiple of --processes")
    options = Options(**vars(given))
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        train, (options, port), nprocs=options.processes, join=False
    )
    interruptions: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        interruptions.append(number)
        for process in context.processes:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    while not context.join():
        pass
    if interruptions:
        raise SystemExit(128 + interruptions[0])


if __name__ == "__main__":
    main()

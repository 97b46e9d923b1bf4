"""Accuracy against tokens: fixed caps, trimmed pictures, and crops where there is detail.

    python -m benchmarks.reduction --output FILE [--url http://HOST:PORT]

The demo model reads, counts and finds objects on pages that are white but for one or two places: a
text, a note, a crowd or objects, drawn anew as in its training on white, within 256 x 192 pixels. A
page of 640 x 480 pixels fits into the 300 tokens of the model; one of 1600 x 1200 is shrunk to
them, by 2.5. Boxes are compared in pixels of the page, as `include_grounding` gives them. All
policies get the same pages.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks import environment
from benchmarks.processes import Server, free_port
from server.demo.media import image_part, png
from server.demo.scoring import score
from server.demo.training.objects import crowd, objects
from server.demo.training.scene import Question, Scene
from server.demo.training.texts import note, text

_SEED = 20261130
_PAGES = {"640x480": (640, 480), "1600x1200": (1600, 1200)}
_CARD = (256, 192)
_GLYPH = 24.0  # pixels: the least height of texts, as in the evaluation
_LENGTHS = range(2, 7)  # of the texts that are read, as in the evaluation
_MAKERS: dict[str, Callable[[random.Random], Scene]] = {
    "read": lambda rng: text(rng, _CARD, False, _GLYPH),
    "read_label": lambda rng: note(rng, _CARD, False),
    "count": lambda rng: crowd(rng, _CARD, False),
    "box": lambda rng: objects(rng, _CARD, False),
}
_WRITTEN = ["read", "read_label"]  # the second place of a page is of the other sort
# By name, the options of the image.
_POLICIES: dict[str, dict[str, Any]] = {
    "whole": {},
    "cap 225": {"max_tokens": 225},
    "cap 150": {"max_tokens": 150},
    "cap 75": {"max_tokens": 75},
    "trim": {"detail": "trim"},
    "salient": {"detail": "salient"},
}
_MARGIN = 16
_AT_ONCE = 8
_TIMEOUT_S = 120.0
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Page:
    """A page as PNG, and a question about it. A box in `expected` is in pixels of the page."""

    kind: str
    task: str
    data: bytes
    question: str
    expected: str


def page(kind: str, size: tuple[int, int], cards: int, task: str, index: int) -> Page:
    """A page with `cards` cards, of which the question is about the first."""
    rng = random.Random(f"{_SEED}/{kind}/{task}/{index}")
    card, question = _asked(rng, task)
    places = _places(rng, size, cards)
    image = Image.new("RGB", size, "white")
    image.paste(card, places[0])
    others = _WRITTEN if task not in _WRITTEN else [it for it in _MAKERS if it not in _WRITTEN]
    for place in places[1:]:
        image.paste(_asked(rng, rng.choice(others))[0], place)
    expected = question.answer
    if task == "box":
        numbers = json.loads(expected)
        across, down = places[0]
        width, height = _CARD
        starts, steps = (across, down) * 2, (width / 1000, height / 1000) * 2
        pixels = [
            start + number * step
            for start, number, step in zip(starts, numbers, steps, strict=True)
        ]
        expected = json.dumps(pixels)
    return Page(kind, task, png(image, fast=True), question.text, expected)


def _asked(rng: random.Random, task: str) -> tuple[Image.Image, Question]:
    """A white card, and a question of this task about it."""
    while True:
        scene = _MAKERS[task](rng)
        fitting = [
            each
            for each in scene.questions
            if each.task == task and (task != "read" or len(each.answer) in _LENGTHS)
        ]
        if fitting and (image := _whitened(scene)) is not None:
            return image, rng.choice(fitting)


def _whitened(scene: Scene) -> Image.Image | None:
    """The card with pure white as its background; None unless it is plain and nearly white."""
    if scene.picture.facts["background"] != "white":
        return None
    pixels = np.array(scene.picture.image)
    behind = pixels[0, 0]
    edges = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    if (edges != behind).any():
        return None
    pixels[(pixels == behind).all(axis=2)] = 255
    return Image.fromarray(pixels)


def _places(rng: random.Random, size: tuple[int, int], cards: int) -> list[tuple[int, int]]:
    """Where the cards are: of two, one in each half."""
    part = size[0] // cards
    starts = [index * part for index in range(cards)]
    rng.shuffle(starts)
    return [
        (
            start + rng.randint(_MARGIN, part - _CARD[0] - _MARGIN),
            rng.randint(_MARGIN, size[1] - _CARD[1] - _MARGIN),
        )
        for start in starts
    ]


async def ask(client: httpx.AsyncClient, given: Page, options: dict[str, Any]) -> tuple[float, int]:
    """The score of the answer, and the tokens of the picture."""
    part = image_part(given.data)
    part["image_url"].update(options)
    body = {
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": given.question}]}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "include_grounding": True,
    }
    response = await client.post("/v1/chat/completions", json=body)
    answer = response.raise_for_status().json()
    got = answer["choices"][0]["message"]["content"] or ""
    if given.task == "box":
        got = json.dumps(next((each["box"] for each in answer["grounding"] if "box" in each), None))
    tokens: int = answer["usage"]["prompt_tokens_details"]["image_tokens"]
    return score(given.task, given.expected, got), tokens


async def measured(url: str, samples: int) -> list[dict[str, Any]]:
    """A row for each kind of page, task and policy."""
    rows = []
    free = asyncio.Semaphore(_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as client:

        async def answered(given: Page, options: dict[str, Any]) -> tuple[float, int]:
            async with free:
                return await ask(client, given, options)

        for name, size in _PAGES.items():
            for cards in (1, 2):
                kind = f"{name}, {cards} card{'s' * (cards > 1)}"
                for task in _MAKERS:
                    pages = [page(kind, size, cards, task, index) for index in range(samples)]
                    for policy, options in _POLICIES.items():
                        found = await asyncio.gather(*[answered(each, options) for each in pages])
                        row = {
                            "page": kind,
                            "task": task,
                            "policy": policy,
                            "score": round(statistics.fmean(score for score, _ in found), 3),
                            "tokens": round(statistics.fmean(tokens for _, tokens in found), 1),
                        }
                        print(json.dumps(row), flush=True)
                        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scores and the mean tokens of each kind of page and policy."""
    found = []
    for kind in dict.fromkeys(row["page"] for row in rows):
        for policy in _POLICIES:
            mine = [row for row in rows if (row["page"], row["policy"]) == (kind, policy)]
            whole = [row for row in rows if (row["page"], row["policy"]) == (kind, "whole")]
            tokens = statistics.fmean(row["tokens"] for row in mine)
            share = tokens / statistics.fmean(row["tokens"] for row in whole)
            scores = {row["task"]: row["score"] for row in mine}
            found.append(
                {
                    "page": kind,
                    "policy": policy,
                    "tokens": round(tokens, 1),
                    "share": round(share, 2),
                    **scores,
                }
            )
    return found


def _start(stack: ExitStack) -> str:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    port = free_port()
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    command += ["--mm-processor-cache-gb", "1", "--disable-uvicorn-access-log"]
    server = Server("saccade", command, port, "/ready", env, folder / "server.log")
    stack.callback(server.stop)
    server.wait_ready()
    return f"http://127.0.0.1:{port}"


def main() -> None:
    options = _options()
    with ExitStack() as stack:
        url = options.url or _start(stack)
        rows = asyncio.run(measured(url, options.samples))
    found = summary(rows)
    for row in found:
        print(json.dumps(row))
    result = {
        "environment": environment.describe(),
        "seed": _SEED,
        "samples": options.samples,
        "summary": found,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--url", help="a running server with the demo model")
    parser.add_argument("--samples", type=int, default=60, help="questions of each task")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Questions of the evaluation: drawn from seeds and asked over HTTP."""

import asyncio
import random
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from server.demo.media import image_part, mp4, png, video_part
from server.demo.scoring import Answer
from server.demo.training.examples import Example, evaluated

_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it is sent. `size` is the class of its pictures, empty without any."""

    question: str
    expected: str
    size: str
    content: list[dict[str, Any]]


def example(seed: int, task: str, index: int) -> Example:
    """The example with this index, the same at every call."""
    return evaluated(random.Random(f"{seed}/{task}/{index}"), task)


def prepare(seed: int, task: str, index: int) -> Asked:
    """The example with this index as message content: pictures or a clip, then the question."""
    made = example(seed, task, index)
    (question,) = made.questions
    content = [_part(picture.frames) for picture in made.pictures]
    content.append({"type": "text", "text": question.text})
    return Asked(question.text, question.answer, _size_class(made), content)


def _size_class(made: Example) -> str:
    sizes = {picture.size for picture in made.pictures}
    if not sizes:
        return ""
    return "224x224" if sizes == {(224, 224)} else "larger"


def _part(frames: list[Image.Image]) -> dict[str, Any]:
    """One picture as PNG, several frames as MP4."""
    return video_part(mp4(frames)) if len(frames) > 1 else image_part(png(frames[0], fast=True))


class Asker:
    """Asks a server with greedy decoding; `pool` draws the pictures."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, pool: Executor, concurrency: int
    ) -> None:
        """`concurrency` limits the questions that are in memory or sent at any time."""
        self._client, self._model, self._pool = client, model, pool
        self._free = asyncio.Semaphore(concurrency)

    async def answers(self, seed: int, task: str, samples: int) -> list[Answer]:
        """The answers to the first `samples` questions of a task; raises `httpx.HTTPError`."""
        async with asyncio.TaskGroup() as group:
            asking = [
                group.create_task(self._answer(seed, task, index)) for index in range(samples)
            ]
        return [each.result() for each in asking]

    async def _answer(self, seed: int, task: str, index: int) -> Answer:
        async with self._free:
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self._pool, prepare, seed, task, index)
            got = await self._ask(asked.content)
        return Answer(task, asked.question, asked.expected, got, asked.size)

    async def _ask(self, content: list[dict[str, Any]]) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.is_error:
            raise httpx.HTTPStatusError(response.text, request=response.request, response=response)
        return response.json()["choices"][0]["message"]["content"] or ""


async def served_model(client: httpx.AsyncClient) -> str:
    """The name of the model that a server serves; raises `httpx.HTTPError`."""
    response = await client.get("/v1/models")
    name: str = response.raise_for_status().json()["data"][0]["id"]
    return name

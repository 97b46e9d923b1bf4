"""The demo model's answers match the pictures, from the file through the whole server."""

import asyncio
import base64
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import demo_pictures, pictures
from tests.conftest import Server
from tests.demo_pictures import Asked

CONNECTIONS = 64
JSON = {"Content-Type": "application/json"}


async def answers(url: str, questions: Iterable[Asked]) -> list[str]:
    """The greedy answers to questions asked concurrently."""
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        (model,) = (await client.get("/v1/models")).json()["data"]

        async def answer(question: Asked) -> str:
            body = {
                "model": model["id"],
                "messages": [{"role": "user", "content": question.content}],
                "temperature": 0,
                "max_tokens": 16,
            }
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            content: str = response.json()["choices"][0]["message"]["content"]
            return content

        return await asyncio.gather(*map(answer, questions))


def ask(server: Server, *questions: Asked) -> list[str]:
    return asyncio.run(answers(server.url, questions))


def expected_answers(questions: Iterable[Asked]) -> list[str]:
    return [question.answer for question in questions]


def test_the_first_readme_request_always_gets_the_right_answer(
    http: httpx.Client, repository: Path
) -> None:
    """The request sets no temperature."""
    readme = (repository / "README.md").read_text()
    body = re.findall(r"-d @- <<END\n(.*?)\nEND\n", readme, re.DOTALL)[0]
    picture = base64.b64encode((repository / "clients/examples/red_circle.png").read_bytes())
    body = body.replace("$(base64 -w0 clients/examples/red_circle.png)", picture.decode())
    assert "temperature" not in json.loads(body)
    for _ in range(5):
        response = http.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.json()["choices"][0]["message"]["content"] == "a red circle"


def distinct_answers(http: httpx.Client, path: str, picture: bytes, **more: Any) -> set[str]:
    """The distinct answers to eight equal requests to read a text, on one of the three APIs."""
    url, read = pictures.data_url(picture), demo_pictures.READ
    parts: dict[str, list[dict[str, Any]]] = {
        "chat/completions": [pictures.image_part(picture), pictures.text_part(read)],
        "responses": [
            {"type": "input_image", "image_url": url},
            {"type": "input_text", "text": read},
        ],
        "messages": [
            {"type": "image", "source": {"type": "url", "url": url}},
            {"type": "text", "text": read},
        ],
    }
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    message = [{"role": "user", "content": parts[path]}]
    body = {
        "model": "saccade-tiny",
        "input" if path == "responses" else "messages": message,
        limit: 16,
        **more,
    }

    def text() -> str:
        response = http.post(f"/v1/{path}", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        if path == "chat/completions":
            return str(answer["choices"][0]["message"]["content"])
        content = answer["output"][0]["content"] if path == "responses" else answer["content"]
        return str(content[0]["text"])

    return {text() for _ in range(8)}


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_answers_are_random_only_if_a_temperature_is_set(http: httpx.Client, path: str) -> None:
    """The text is too small to read, so sampling gives a different guess nearly every time."""
    picture = demo_pictures.unreadable_text()
    greedy = distinct_answers(http, "chat/completions", picture, temperature=0)
    assert len(greedy) == 1
    assert distinct_answers(http, path, picture) == greedy
    assert len(distinct_answers(http, path, picture, temperature=1)) > 1


@pytest.mark.parametrize("turn", range(2))
def test_fifty_concurrent_pictures_are_not_mixed_up(server: Server, turn: int) -> None:
    """In the second turn, the images come from the caches."""
    different = demo_pictures.fifty()
    assert len(set(expected_answers(different))) == len(different) == 50
    chance = random.Random(turn)
    questions = different + chance.choices(different, k=50)
    chance.shuffle(questions)
    assert ask(server, *questions) == expected_answers(questions)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_pictures_keep_the_order_of_the_request(server: Server, count: int) -> None:
    questions = list(demo_pictures.orders(count))
    assert ask(server, *questions) == expected_answers(questions)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(server: Server, orientation: int) -> None:
    tagged = demo_pictures.turned(orientation)
    plain = demo_pictures.turned(orientation, tagged=False)
    shown, stored = ask(server, tagged, plain)
    assert shown == tagged.answer
    assert (stored == plain.answer) == (orientation == 1)


@pytest.mark.parametrize("color", demo_pictures.NAMED)
def test_every_file_format_keeps_its_colors(server: Server, color: str) -> None:
    questions = demo_pictures.kinds(color)
    shown = ask(server, *questions.values())
    assert dict(zip(questions, shown, strict=True)) == {
        kind: question.answer for kind, question in questions.items()
    }


def test_a_16_bit_grey_image_keeps_its_color(server: Server) -> None:
    question = demo_pictures.deep_grey()
    assert ask(server, question) == [question.answer]


def test_small_text_is_read_at_full_size_but_not_under_a_cap(server: Server) -> None:
    fine = demo_pictures.small_text(detail="high")
    coarse = demo_pictures.small_text(detail="high", max_tokens=demo_pictures.CAP)
    read, guessed = ask(server, fine, coarse)
    assert read == fine.answer
    assert guessed != fine.answer

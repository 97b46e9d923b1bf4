"""Random bodies in every dialect are read, loaded and rewritten, or refused."""

import asyncio
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from server.errors import ClientError
from server.ingest.load import MediaLoader
from tests import pictures
from tests.media import CHAT, media_loader, pdf, read

IMAGE = pictures.data_url(pictures.encode(pictures.shape("red")), "image/png")
PDF = pictures.data_url(pdf((50, 50), (60, 60)), "application/pdf")
LONG = "data:image/png;base64," + "A" * 20_000
ROUTES = (
    CHAT, "/v1/messages", "/v1/responses", "/v1/images/tokens", "/pooling", "/score",
)  # fmt: skip

TYPES = (
    "text", "image_url", "input_image", "image_file", "file", "input_file", "video_url",
    "audio_url", "input_audio", "image", "document", "tool_result", "image_embeds", "refusal",
    "message", "reasoning", "function_call_output", "base64", "url", "content", "unknown",
)  # fmt: skip
KEYS = (
    "type", "text", "image_url", "url", "file", "file_data", "file_id", "file_url", "image_file",
    "video_url", "audio_url", "input_audio", "data", "source", "content", "title", "detail",
    "max_tokens", "frames", "pages", "uuid", "role", "output", "summary", "status",
)  # fmt: skip
# None of these URLs causes a request outside the process.
TEXTS = (
    IMAGE, IMAGE.partition(",")[2], PDF, LONG, "", "\0", "data:", "data:,%", "data:;base64,@",
    "data:video/jpeg;base64,/9j/,/9j/", "http://", "http://\0/", "http://[::1", "http://127.0.0.1/",
    "file:///etc/passwd", "file://\0", "low", "1-3", "9" * 50, "saccade-payload-0", "../file",
)  # fmt: skip
NUMBERS = (0, -1, 1, 7, 1.5, 10**18, 10**30, 10**400, -1e308)
TOP = (
    "messages", "input", "inputs", "data_1", "queries", "documents", "images", "system",
    "max_image_tokens", "include_image_details", "include_grounding", "stream", "stream_options",
)  # fmt: skip
BODIES = 2000


class Bodies:
    """Random JSON documents that are mostly shaped like requests."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def document(self) -> dict[str, Any]:
        makers = (self._messages, self._messages, self._parts, self._value)
        keys = self._random.sample(TOP, self._random.randint(0, 3))
        return {key: self._random.choice(makers)() for key in keys}

    def route(self) -> str:
        return self._random.choice(ROUTES)

    def _messages(self) -> list[Any]:
        return self._some(lambda: {"content": self._parts(), **self._object(self._leaf)})

    def _parts(self) -> list[Any]:
        return self._some(lambda: {"type": self._random.choice(TYPES), **self._object(self._value)})

    def _value(self, depth: int = 0) -> Any:
        if depth == 3 or self._random.random() < 0.6:
            return self._leaf()
        if self._random.random() < 0.3:
            return self._some(lambda: self._value(depth + 1))
        found = self._object(lambda: self._value(depth + 1))
        return (
            found | {"type": self._random.choice(TYPES)} if self._random.random() < 0.5 else found
        )

    def _object(self, value: Callable[[], Any]) -> dict[str, Any]:
        return {self._random.choice(KEYS): value() for _ in range(self._random.randint(0, 4))}

    def _some(self, value: Callable[[], Any]) -> list[Any]:
        return [value() for _ in range(self._random.randint(0, 3))]

    def _leaf(self) -> Any:
        leaves = (None, True, False, *NUMBERS)
        kinds = (leaves, NUMBERS, TEXTS, TEXTS, TYPES)
        if self._random.random() < 0.1:
            codes = self._random.choices(range(0xD800), k=self._random.randint(0, 5))
            return "".join(map(chr, codes))
        return self._random.choice(self._random.choice(kinds))


@pytest.fixture(scope="module")
def loader() -> MediaLoader:
    return media_loader()


def has_path(document: Any, path: str) -> bool:
    """Whether `path` without its last step exists in `document`."""
    for step in re.findall(r"\w+|\[\d+\]", path.rpartition(".")[0]):
        key = int(step[1:-1]) if step[0] == "[" else step
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def refusal(loader: MediaLoader, body: bytes, route: str) -> ClientError | None:
    try:
        found = read(body, route)
        asyncio.run(loader.load(found.context))
        written = found.rewritten()
    except ClientError as error:
        return error
    json.loads(written)
    assert all(ref.source is None for ref in found.context.media)
    return None


def test_any_body_is_read_or_refused_with_a_client_error(loader: MediaLoader) -> None:
    made = Bodies(1)
    bodies = [(made.document(), made.route()) for _ in range(BODIES)]
    bodies.append(({"messages": [{"content": [{"type": "input_audio"}]}]}, CHAT))
    refused = 0
    for document, route in bodies:
        error = refusal(loader, json.dumps(document).encode(), route)
        refused += error is not None
        if error is not None and error.param is not None:
            assert has_path(document, error.param), (document, route, error.param)
    assert 100 < refused < BODIES - 100

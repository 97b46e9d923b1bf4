"""Requests of many users who each ask repeatedly about one picture.

The question comes before the picture and differs in each turn. The language model's prefix cache is
then useless, and only a cache of embeddings saves the encoder's work. All users have their first
turn, then all their second, so pictures recur in a cycle.
"""

import base64
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks import photos

MODEL_NAME = "model"
"""The name by which all servers know the model."""

_MAX_TOKENS = 8
_WORDS = 12
_SEED = 20261120


@dataclass(frozen=True, slots=True)
class Chats:
    """`turns` holds the files of request bodies: of each turn, in the order of the users."""

    turns: list[list[str]]

    @property
    def bodies(self) -> list[str]:
        """All requests in the order in which they are sent."""
        return list(itertools.chain(*self.turns))

    @property
    def pictures(self) -> int:
        return len(self.turns[0])


class ChatBodies:
    """Writes request bodies into `folder`. Chats share no pictures and no questions.

    `side` is the width and height of each picture, in pixels.
    """

    def __init__(self, folder: Path, side: int) -> None:
        self._folder = folder
        self._side = side
        self._pictures = itertools.count(_SEED)
        self._serial = itertools.count()
        self._random = random.Random(_SEED)

    def chats(self, users: int, turns: int) -> Chats:
        """Return new chats, each with its own picture."""
        urls = [self._picture() for _ in range(users)]
        return Chats([[self._write(url) for url in urls] for _ in range(turns)])

    def _picture(self) -> str:
        picture = photos.photo(self._side, self._side, next(self._pictures))
        return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"

    def _write(self, url: str) -> str:
        serial = next(self._serial)
        words = " ".join(self._random.choices(photos.WORDS, k=_WORDS))
        content = [
            {"type": "text", "text": f"{serial}: {words}?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        request = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": _MAX_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        path = self._folder / f"{serial:06}.json"
        path.write_text(json.dumps(request))
        return str(path)

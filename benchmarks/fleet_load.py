"""Clients that ask about pictures, for `benchmarks.fleet`."""

import io
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from saccade_client import Client

SERVED_BY = "X-Served-By"
"""The header in which haproxy names the server."""
_SIDE = 224
_TIMEOUT_S = 120
# Answers of different lengths: else all requests of a batch end at once, and the next come at once.
_MOST_TOKENS, _STRIDE = 24, 7


class _Counting(httpx.HTTPTransport):
    """Notes how each attempt of a request ended."""

    def __init__(self, noted: "Load") -> None:
        super().__init__()
        self._noted = noted

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = super().handle_request(request)
        except httpx.TransportError as error:
            self._noted.failed_attempts[type(error).__name__] += 1
            raise
        if response.status_code != httpx.codes.OK:
            self._noted.failed_attempts[str(response.status_code)] += 1
        return response


@dataclass
class Load:
    """Clients that send requests about a list of pictures, in its order, each when it is free."""

    url: str
    files: Sequence[bytes]
    order: Sequence[int]
    clients: int = 1
    # (number in the order, server, how far the picture was cached) of each answer.
    answers: list[tuple[int, str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    failed_attempts: Counter[str] = field(default_factory=Counter)
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> "Load":
        threads = [threading.Thread(target=self._client) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def _client(self) -> None:
        with Client(f"{self.url}/v1", model="saccade-tiny", resize=False, reuse=False) as client:
            transport = _Counting(self)
            client.__dict__["_http"] = httpx.Client(transport=transport, timeout=_TIMEOUT_S)
            while (number := self._take()) is not None:
                try:
                    picture = self.files[self.order[number]]
                    answer = client.ask(
                        "What is in the image?",
                        picture,
                        max_tokens=1 + number * _STRIDE % _MOST_TOKENS,
                        ignore_eos=True,
                        include_image_details=True,
                    )
                except Exception as error:
                    self.failures.append(repr(error))
                    continue
                (image,) = answer.images
                server = answer.headers.get(SERVED_BY, "")
                self.answers.append((number, server, str(image.cached)))

    def _take(self) -> int | None:
        with self._lock:
            if self._next == len(self.order):
                return None
            self._next += 1
            return self._next - 1

    def summary(self, since: int = 0) -> dict[str, Any]:
        """Of the requests from `since` on: hit rate, and the load of the hottest server."""
        counted = [answer for answer in self.answers if answer[0] >= since]
        served = Counter(server for _, server, _ in counted)
        hits = sum(cached == "embedding" for _, _, cached in counted)
        return {
            "requests": len(counted),
            "hit_rate": round(hits / len(counted), 4),
            "hottest_over_mean": round(2 * max(served.values()) / len(counted), 3),
            "failures": self.failures,
            "failed_attempts": dict(self.failed_attempts),
        }


def files(count: int) -> list[bytes]:
    """PNG files of pictures of one size that differ."""
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((_SIDE, _SIDE))
        file = io.BytesIO()
        image.save(file, "PNG")
        found.append(file.getvalue())
    return found

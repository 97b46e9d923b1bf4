"""One client of a soak: exchanges on one kept connection, some of them broken off on purpose."""

import contextlib
import http.client
import itertools
import json
import random
import time
from typing import Any

from benchmarks import photos
from benchmarks.soak_files import Files
from tests.hostile_origin import HostileOrigin

_TIMEOUT_S = 120.0


class Left(Exception):
    """The client has left on purpose."""


class Client:
    """Sends one request at a time. `number` decides what it draws from `rng`."""

    def __init__(self, port: int, number: int, files: Files, origin: HostileOrigin) -> None:
        self.rng = random.Random(f"soak {number}")
        self.files, self.origin = files, origin
        self._port, self._number = port, number
        self._connection = self._connected()
        self._serial = itertools.count()

    def close(self) -> None:
        """Close the connection; the next request opens it again."""
        self._connection.close()

    def post(self, path: str, document: Any, leave: str = "") -> tuple[int, bytes]:
        """Send a body and read the answer; with `leave`, go away at that point."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.exchange("POST", path, body, {"Content-Type": "application/json"}, leave)

    def exchange(
        self, method: str, path: str, body: bytes, headers: dict[str, str], leave: str = ""
    ) -> tuple[int, bytes]:
        """Raises `Left` at the point `leave`: "body", "waiting" or "stream"."""
        if leave:
            return self._leave(method, path, body, headers, leave)
        kept = self._connection.sock is not None
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        except ConnectionError:  # the server may close a kept connection at any time
            self._connection.close()
            if not kept:
                raise
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        return response.status, response.read()

    def _leave(
        self, method: str, path: str, body: bytes, headers: dict[str, str], leave: str
    ) -> tuple[int, bytes]:
        connection = self._connected()
        with contextlib.closing(connection):
            if leave == "body":
                connection.putrequest(method, path)
                connection.putheader("Content-Length", str(len(body)))
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body[: len(body) // 2])
                time.sleep(self.rng.uniform(0, 0.5))
            else:
                connection.request(method, path, body, headers)
                time.sleep(self.rng.choice((0.0, 0.01, 0.05, 0.2, 0.5)))
                if leave == "stream":
                    connection.getresponse().readline()
        raise Left(f"left: {leave}")

    def _connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)

    def question(self) -> str:
        words = " ".join(self.rng.choices(photos.WORDS, k=8))
        return f"{self._number}-{next(self._serial)}: {words}?"

"""The servers of the cache benchmark: their command lines, and the statistics of their caches."""

import http.client
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chats import MODEL_NAME, Chats
from benchmarks.processes import Server, ServerFailed

_TOKENS_A_SIDE = 16
PICTURE_TOKENS = _TOKENS_A_SIDE**2
"""Tokens of each picture."""

_PLAIN = ("-m", "vllm.entrypoints.openai.api_server", "--model")
_OURS = ("-m", "server", "serve")
_ADMIN_KEY = "benchmark"
_TIMEOUT = 120.0
# Log lines that a server may still write after its last answer.
_LOG_DELAY = 1.0
_ENCODED = re.compile(rb"encoder inputs: (\d+), encoder output embeddings: (\d+)")


def picture_side(model: Path) -> int:
    """Return the side, in pixels, of a square picture with `PICTURE_TOKENS` tokens."""
    processor = json.loads((model / "preprocessor_config.json").read_text())
    side: int = _TOKENS_A_SIDE * processor["patch_size"] * processor["merge_size"]
    return side


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration: its name in the table, and the flags that only it has."""

    name: str
    flags: tuple[str, ...] = ()
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Common:
    """The options that all servers of a session share."""

    model: Path
    picture_side: int  # in pixels
    gpu_tokens: int  # of vLLM's encoder cache, and of a step of the engine
    engine_cores: str | None

    def command(self, setup: Setup, port: int) -> list[str]:
        """Return the command line of a server."""
        flags = ["--port", str(port), "--served-model-name", MODEL_NAME]
        flags += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
        flags += ["--max-num-seqs", "16", "--max-num-batched-tokens", str(self.gpu_tokens)]
        flags += ["--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]
        flags += ["--mm-processor-kwargs", json.dumps({"max_pixels": self.picture_side**2})]
        flags += ["--mm-processor-cache-gb", "1", "--disable-uvicorn-access-log"]
        flags += ["--enable-logging-iteration-details"]
        if not setup.plain:
            flags += ["--admin-key", _ADMIN_KEY]
        start = _PLAIN if setup.plain else _OURS
        return [sys.executable, *start, str(self.model), *flags, *setup.flags]

    def environment(self) -> dict[str, str]:
        """Return the variables of a server's process; vLLM counts encoder runs at INFO."""
        env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        env["VLLM_LOGGING_LEVEL"] = "INFO"
        if self.engine_cores:
            env["VLLM_CPU_OMP_THREADS_BIND"] = self.engine_cores
        return env


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since a server was started. Plain vLLM has no `hits`, which are by tier."""

    encoder_runs: int
    hits: dict[str, int]

    def __sub__(self, other: "Counters") -> "Counters":
        hits = {tier: count - other.hits.get(tier, 0) for tier, count in self.hits.items()}
        return Counters(self.encoder_runs - other.encoder_runs, hits)


class Replica:
    """A running server of a configuration."""

    def __init__(self, setup: Setup, common: Common, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.setup = setup
        self._log = folder / f"{setup.name}-{port}.log"
        self.server = Server(
            setup.name,
            common.command(setup, port),
            port,
            "/health" if setup.plain else "/ready",
            common.environment(),
            self._log,
        )

    def counters(self) -> Counters:
        """Return the totals; call it when no request is in progress."""
        time.sleep(_LOG_DELAY)
        return Counters(sum(runs for runs, _ in self._encoded()), self._hits())

    def logprobs(self, chats: Chats) -> list[list[float]]:
        """Ask one question after the other; return the log-probabilities of each answer's tokens.

        The requests are also those that warm a server up.

        Raises:
            ServerFailed: a request fails, or the encoder's runs are not logged as expected.
        """
        found = [self._ask(Path(body)) for body in chats.bodies]
        time.sleep(_LOG_DELAY)
        encoded = list(self._encoded())
        if not self.setup.plain and not encoded:
            return found  # a cache of an earlier server may hold all of them
        if not encoded or any(tokens != runs * PICTURE_TOKENS for runs, tokens in encoded):
            raise ServerFailed(f"{self.setup.name}: pictures do not take {PICTURE_TOKENS} tokens")
        return found

    def _ask(self, path: Path) -> list[float]:
        body = json.loads(path.read_text())
        del body["stream_options"]
        body |= {"stream": False, "logprobs": True}
        answer = self._exchange("POST", "/v1/chat/completions", json.dumps(body))
        content = answer["choices"][0]["logprobs"]["content"]
        return [float(token["logprob"]) for token in content]

    def _hits(self) -> dict[str, int]:
        if self.setup.plain:
            return {}
        tiers = self._exchange("GET", "/v1/cache").get("embeddings", {})
        return {tier: int(counts["hits"]) for tier, counts in tiers.items()}

    def _exchange(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {_ADMIN_KEY}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=_TIMEOUT)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise ServerFailed(f"{self.setup.name}: {path}: {content[:300].decode()}")
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _encoded(self) -> Iterator[tuple[int, int]]:
        """Yield the encoder's runs and tokens for each step that has any."""
        for match in _ENCODED.finditer(self._log.read_bytes()):
            yield int(match[1]), int(match[2])


@contextmanager
def replicas(setups: Sequence[Setup], common: Common, folder: Path) -> Iterator[list[Replica]]:
    """Start servers side by side, and always end them."""
    with ExitStack() as stack:
        started = []
        for setup in setups:
            started.append(Replica(setup, common, folder))
            stack.callback(started[-1].server.stop)
        for replica in started:
            replica.server.wait_ready()
        yield started

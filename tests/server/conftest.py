"""Servers that several test files share. The flags of each server suit all of its tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import otlp
from tests.conftest import Server, serving
from tests.otlp import Receiver

# API keys of the guarded server. All but FLAG are in its keys file.
A, A2, B = "sk-secret-of-a", "sk-secret-of-a-too", "sk-secret-of-b"
ADMIN, FLAG = "sk-secret-of-admin", "sk-secret-of-flag"
# Of keys with limits; each is used by one test.
FEW, TWO, SPENT = "sk-secret-of-few", "sk-secret-of-two", "sk-secret-of-spent"
KEYS: dict[str, Any] = {
    "groups": {
        "team-a": [A, A2],
        "team-b": [B],
        "limited": [
            {"key": FEW, "requests_per_minute": 3},
            {"key": TWO, "concurrency": 2},
            {"key": SPENT, "image_tokens_per_minute": 1},
        ],
    },
    "admin": [ADMIN],
}


@pytest.fixture(scope="session")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(KEYS))
    return path


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """The OTLP receiver of the guarded server's traces."""
    with otlp.receiver() as received:
        yield received


@pytest.fixture(scope="session")
def guarded(
    keys_file: Path, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that requires API keys, logs JSON and exports traces.

    It is executed, because its environment must not be in other processes."""
    keys = ("--api-keys-file", str(keys_file), "--api-key", FLAG)
    telemetry = ("--log-format", "json", "--otlp-traces-endpoint", receiver.endpoint)
    more = ("--max-model-len", "4096", "--enable-scale-out", "--no-server-timing")
    # This variable would switch the Prometheus client library to metrics in files.
    files = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics"))}
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", **files}
    with serving(*keys, *telemetry, *more, executed=True, **environment) as running:
        yield running


@pytest.fixture(scope="session")
def tight() -> Iterator[Server]:
    """A server with tight limits for videos and on requests, and an image cache that holds two
    pictures.

    The tests that overfill the cache send pictures of up to 2.3 MB.
    """
    videos = ("--video-timeout-s", "0.7", "--video-max-memory-mb", "128")
    fetches = ("--allowed-private-media", "127.0.0.1")
    with serving(
        *(*videos, "--max-video-bytes", str(4 << 20), "--trust-request-mm-kwargs"),
        *("--max-running-requests", "4", "--max-waiting-requests", "16"),
        *(*fetches, "--max-model-len", "4096", "--mm-processor-cache-gb", "0.0030"),
        *("--no-playground", "--disable-fastapi-docs"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def scarce() -> Iterator[Server]:
    """A server with one image worker and room for two requests, two that wait, and 80 image
    tokens. Its steps are small, so that a long prompt takes many."""
    with serving(
        *("--max-running-requests", "2", "--max-waiting-requests", "2", "--image-workers", "1"),
        *("--max-num-queued-reqs", "6", "--max-running-image-tokens", "80"),
        *("--allowed-private-media", "127.0.0.1", "--max-model-len", "4096"),
        *("--max-num-batched-tokens", "256"),
    ) as running:
        yield running

"""Start and stop: flags as in vLLM, clear refusals, and no process left behind."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests import pictures
from tests.conftest import STOP_TIMEOUT_S, Server, assert_nothing_is_left, serving
from tests.pictures import image_part, shape, text_part, user
from tests.scrape import value, wait_for

ASK = user(image_part(pictures.encode(shape("red"))), text_part("What is in the image?"))
REQUEST = {"model": "my-model", "messages": ASK, "temperature": 0}
KEY = {"Authorization": "Bearer secret"}
MAX_BODY = 200_000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key in one file."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(
        ["openssl", "req", *kind, "-keyout", key, "-out", cert, "-days", "2", *subject],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """What systemd listens to: a service of Type=notify reports its state there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.settimeout(10)
        bound.bind(str(tmp_path_factory.mktemp("systemd") / "notify"))
        yield bound


@pytest.fixture(scope="module")
def secured(certificate: Path, manager: socket.socket) -> Iterator[Server]:
    """A server with vLLM's flags for keys, CORS, TLS and root path, in `exact` mode."""
    with serving(
        *("--api-key", "secret", "--root-path", "/vlm", "--served-model-name", "my-model"),
        *("--allowed-origins", '["https://example.org"]', "--image-decode", "exact"),
        *("--ssl-keyfile", str(certificate / "key.pem")),
        *("--ssl-certfile", str(certificate / "cert.pem")),
        "--enable-ssl-refresh",
        *("--limit-mm-per-prompt", '{"image": 2}', "--enable-request-id-headers"),
        SACCADE_MAX_REQUEST_BYTES=str(MAX_BODY),
        NOTIFY_SOCKET=manager.getsockname(),
    ) as server:
        yield server


@pytest.fixture
def web(secured: Server, certificate: Path) -> Iterator[httpx.Client]:
    verify = str(certificate / "cert.pem")
    with httpx.Client(base_url=secured.url, verify=verify, timeout=60) as client:
        yield client


def test_tls_and_keys(secured: Server, web: httpx.Client) -> None:
    assert secured.url.startswith("https://")
    refused = web.post("/v1/chat/completions", json=REQUEST)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    answer = web.post("/v1/chat/completions", json=REQUEST, headers=KEY)
    assert answer.json()["choices"][0]["message"]["content"] == "a red circle"
    assert answer.headers["X-Request-Id"]
    assert web.get("/health").status_code == 200


def test_an_unauthorised_body_is_not_read(secured: Server, web: httpx.Client) -> None:
    refused = web.post("/v1/chat/completions", content=b"x" * (2 * MAX_BODY))
    assert refused.status_code == 401


def test_bodies_are_limited(web: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 65536

    headers = {**KEY, "Content-Type": "application/json"}
    for content in (b" " * (MAX_BODY + 1), endless()):
        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
            response = web.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
    assert web.get("/ready").status_code == 200


def test_cors_root_path_and_limits(web: httpx.Client) -> None:
    asking = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    preflight = web.options("/v1/chat/completions", headers=asking)
    assert preflight.headers["access-control-allow-origin"] == "https://example.org"
    servers = web.get("/openapi.json", headers=KEY).json()["servers"]
    assert servers == [{"url": "/vlm"}]
    part = ASK[0]["content"][0]
    many = {"model": "my-model", "messages": user(part, part, part)}
    response = web.post("/v1/chat/completions", json=many, headers=KEY)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "too_many_images"
    assert error["param"] == "messages[0].content[2].image_url"
    assert "more than 2 images" in error["message"]


def test_sigterm_lets_running_requests_finish_and_leaves_nothing(
    secured: Server, manager: socket.socket
) -> None:
    """The last test with this server: it ends it."""
    assert manager.recv(100) == b"READY=1"
    children = secured.children()
    assert len(secured.image_workers()) == 2
    assert secured.named("VLLM::EngineCore")
    answers: list[httpx.Response] = []

    def ask() -> None:
        long = {**REQUEST, "max_tokens": 400, "ignore_eos": True}
        with httpx.Client(base_url=secured.url, verify=False, timeout=60) as client:
            answers.append(client.post("/v1/chat/completions", json=long, headers=KEY))

    asking = threading.Thread(target=ask)
    with httpx.Client(base_url=secured.url, verify=False, timeout=60, headers=KEY) as client:
        asking.start()
        wait_for(client, lambda now: value(now, "saccade_requests_in_flight") == 1)
    assert secured.stop(signal.SIGTERM) == 0
    assert manager.recv(100) == b"STOPPING=1"
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    assert_nothing_is_left(children)


@pytest.mark.parametrize("stage", ["loading vLLM", "starting the engine"])
def test_a_signal_during_the_start_leaves_nothing(stage: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    while stage not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert "stopped during start-up" in errors
    assert "Traceback" not in errors
    assert process.returncode == 130
    assert_nothing_is_left(children)


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Each call in a child, which has vLLM already.
CALLS = """
import json, os, sys
from server import cli
from server.engine import arguments
for call in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if not os.fork():
        os.environ.update(call["environment"])
        os.dup2(os.open(call["errors"], os.O_WRONLY | os.O_CREAT), 2)
        cli.main(call["flags"])
        os._exit(0)
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status))
"""


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[list[str], dict[str, str], str]] = [
        (["serve", "--no-such-flag"], {}, "--no-such-flag"),
        (["serve", "--image-workers", "none"], {}, "image_workers"),
        (["serve"], {"SACCADE_IMAGE_WORKRES": "2"}, "SACCADE_IMAGE_WORKRES"),
        (["serve", "--headless"], {}, "--headless is not supported"),
        (["serve", "--api-server-count", "4"], {}, "--image-workers"),
        (["sevre"], {}, "unknown command 'sevre'"),
    ]
    files = [tmp_path / str(number) for number in range(len(wrong))]
    calls = [
        {"flags": flags, "environment": environment, "errors": str(file)}
        for (flags, environment, _), file in zip(wrong, files, strict=True)
    ]
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split()[-len(wrong) :] == ["2"] * len(wrong)
    for (flags, _, message), file in zip(wrong, files, strict=True):
        errors = file.read_text()
        assert message in errors, flags
        assert "Traceback" not in errors, flags


def test_help_and_version() -> None:
    assert "saccade serve" in start("--help").stdout
    assert re.fullmatch(r"saccade \d+\.\d+\.\d+\n", start("--version").stdout)
    listed = start("serve", "--help=Saccade").stdout
    assert "--image-workers" in listed
    assert "--fetch-timeout-s" in listed


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = start("serve", "--host", "127.0.0.1", "--port", port)
    assert done.returncode == 1
    assert "cannot start" in done.stderr
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr

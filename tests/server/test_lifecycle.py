"""Start-up and shutdown: vLLM's flags, clear error messages, and no process left behind."""

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
from typing import Any

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
    """A folder with a self-signed certificate for 127.0.0.1, `cert.pem`, and its key, `key.pem`."""
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
    """The socket on which systemd receives state reports from a service of Type=notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.settimeout(10)
        bound.bind(str(tmp_path_factory.mktemp("systemd") / "notify"))
        yield bound


@pytest.fixture(scope="module")
def secured(certificate: Path, manager: socket.socket) -> Iterator[Server]:
    """A server with vLLM's flags for keys, CORS, TLS and root path, in `exact` mode, that caps
    every image."""
    with serving(
        *("--api-key", "secret", "--root-path", "/vlm", "--served-model-name", "my-model"),
        *("--allowed-origins", '["https://example.org"]', "--image-decode", "exact"),
        *("--ssl-keyfile", str(certificate / "key.pem")),
        *("--ssl-certfile", str(certificate / "cert.pem")),
        "--enable-ssl-refresh",
        *("--limit-mm-per-prompt", '{"image": 2}', "--enable-request-id-headers"),
        *("--max-image-tokens", "30"),
        SACCADE_MAX_REQUEST_BYTES=str(MAX_BODY),
        NOTIFY_SOCKET=manager.getsockname(),
    ) as server:
        yield server


@pytest.fixture
def web(secured: Server, certificate: Path) -> Iterator[httpx.Client]:
    verify = str(certificate / "cert.pem")
    with httpx.Client(base_url=secured.url, verify=verify, timeout=60) as client:
        yield client


def test_a_tls_server_answers_only_with_a_valid_key(secured: Server, web: httpx.Client) -> None:
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


def test_an_oversized_body_is_refused(web: httpx.Client) -> None:
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


def test_flags_for_cors_root_path_and_image_limit_apply(web: httpx.Client) -> None:
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


@pytest.mark.parametrize(
    ("options", "fewest", "most"),
    [({}, 20, 30), ({"detail": "high", "max_tokens": 500}, 20, 30), ({"max_tokens": 9}, 1, 9)],
)
def test_the_server_cap_applies_to_every_image(
    web: httpx.Client, options: dict[str, Any], fewest: int, most: int
) -> None:
    part = image_part(pictures.encode(pictures.photo((640, 480), 7), "JPEG"))
    part["image_url"].update(options)
    request = {**REQUEST, "messages": user(part), "max_tokens": 1}
    answer = web.post("/v1/chat/completions", json=request, headers=KEY).raise_for_status().json()
    tokens = answer["usage"]["prompt_tokens_details"]["image_tokens"]
    assert fewest <= tokens <= most


@pytest.mark.ends_server
def test_sigterm_lets_running_requests_finish_and_leaves_no_process(
    secured: Server, manager: socket.socket
) -> None:
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
    assert "leaked" not in "".join(secured.log)  # what libraries print of objects that live at exit
    assert manager.recv(100) == b"STOPPING=1"
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    assert_nothing_is_left(children)


@pytest.mark.ends_server
def test_a_dead_engine_ends_the_server(guarded: Server) -> None:
    """The engine cannot be restarted alone, so a supervisor has to restart the server."""
    children = guarded.children()
    (core,) = guarded.named("VLLM::EngineCore")
    core.kill()
    assert guarded.process.wait(STOP_TIMEOUT_S) == 1
    assert_nothing_is_left(children)


@pytest.mark.parametrize("stage", ["loading vLLM", "starting the engine"])
def test_a_signal_during_start_up_leaves_no_process(stage: str) -> None:
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


# Runs each command in a fork of a process that has already imported vLLM.
COMMANDS = """
import json, os, sys
from server import app, cli
from server.engine import arguments
for command in json.loads(sys.argv[1]):
    if not os.fork():
        os.environ.update(command["environment"])
        for stream in ("stdout", "stderr"):
            to = os.open(command[stream], os.O_WRONLY | os.O_CREAT)
            os.dup2(to, getattr(sys, stream).fileno())
        cli.main(command["words"])
        sys.stdout.flush()
        os._exit(0)
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
# Refused commands: {command: (environment, exit status, text on standard error)}.
REFUSED: dict[str, tuple[dict[str, str], int, str]] = {
    "serve --no-such-flag": ({}, 2, "--no-such-flag"),
    "serve --image-workers none": ({}, 2, "image_workers"),
    "serve": ({"SACCADE_IMAGE_WORKRES": "2"}, 2, "SACCADE_IMAGE_WORKRES"),
    "serve --headless": ({}, 2, "--headless is not supported"),
    "serve --api-server-count 4": ({}, 2, "--image-workers"),
    "sevre": ({}, 2, "unknown command 'sevre'"),
    "serve --port 0 --allowed-private-media 10.0.0.0/99": ({}, 1, "10.0.0.0/99"),
}
SHOWN = {
    "--help": "saccade serve",
    "--version": r"\Asaccade \d+\.\d+\.\d+\n\Z",
    "serve --help=Saccade": r"--fetch-timeout-s(.|\n)+--image-workers",
}


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, subprocess.CompletedProcess[str]]:
    """The results of all commands that exit by themselves."""
    folder = tmp_path_factory.mktemp("commands")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = {name: name.split() for name in (*REFUSED, *SHOWN)}
        words["taken port"] = ["serve", "--host", "127.0.0.1", "--port", port]
        files = {name: (folder / f"{n}.out", folder / f"{n}.err") for n, name in enumerate(words)}
        commands = [
            {
                "words": words[name],
                "environment": REFUSED[name][0] if name in REFUSED else {},
                "stdout": str(files[name][0]),
                "stderr": str(files[name][1]),
            }
            for name in words
        ]
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(commands)],
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
    statuses = map(int, done.stdout.split()[-len(words) :])
    return {
        name: subprocess.CompletedProcess(name, status, *(f.read_text() for f in files[name]))
        for name, status in zip(words, statuses, strict=True)
    }


@pytest.mark.parametrize("command", REFUSED)
def test_an_invalid_command_exits_with_a_clear_error(
    command: str, ended: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    _, status, message = REFUSED[command]
    assert ended[command].returncode == status
    assert message in ended[command].stderr
    assert "Traceback" not in ended[command].stderr


@pytest.mark.parametrize("command", SHOWN)
def test_help_and_version_are_printed(
    command: str, ended: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    assert ended[command].returncode == 0
    assert re.search(SHOWN[command], ended[command].stdout)


def test_a_port_in_use_stops_the_start_up_with_a_clear_error(
    ended: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = ended["taken port"]
    assert done.returncode == 1
    assert "cannot start" in done.stderr
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr

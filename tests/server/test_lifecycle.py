"""Start-up and shutdown: vLLM's flags, clear error messages, and no process left behind."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.scratch import remove_left
from tests import pictures
from tests.conftest import STOP_TIMEOUT_S, Origin, Server, assert_nothing_is_left, serving
from tests.pictures import image_part, shape, text_part, user
from tests.scrape import Series, value, wait_for
from tests.server.conftest import FLAG
from tests.starts import template

ASK = user(image_part(pictures.encode(shape("red"))), text_part("What is in the image?"))
REQUEST = {"model": "my-model", "messages": ASK, "temperature": 0}
KEY = {"Authorization": "Bearer secret"}
MAX_BODY = 200_000


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
        executed=True,
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


def test_image_workers_come_from_a_process_without_the_servers_variables(secured: Server) -> None:
    (forkserver,) = secured.named("SACCADE::Forkserver")
    (template,) = secured.named("SACCADE::Template")
    assert forkserver.ppid() == template.pid
    assert template.ppid() == secured.process.pid
    for process in (forkserver, template):
        assert "NOTIFY_SOCKET" not in process.environ()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"n": 2, "temperature": 1, "seed": 5, "stream_options": {"include_usage": True}},
        {"stop": ["circle"], "include_stop_str_in_output": True},
        {"max_tokens": 2},
        {"include_image_details": True, "stream_options": {"include_usage": True}},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_a_stream_of_text_holds_what_vllm_writes(
    web: httpx.Client, options: dict[str, Any]
) -> None:
    """The server writes streams of text itself. One that shows the prompt is left to vLLM."""
    asked = {**REQUEST, "stream": True, "max_tokens": 20, **options}
    assert_same(stream(web, asked), stream(web, {**asked, "return_prompt_text": True}))


def test_a_stream_of_invocations_is_that_of_the_chat_route(web: httpx.Client) -> None:
    asked = {**REQUEST, "stream": True, "max_tokens": 20}
    assert_same(stream(web, asked, "/invocations"), stream(web, asked))


Stream = tuple[dict[int, str], dict[str, set[str]]]


def assert_same(first: Stream, second: Stream) -> None:
    (text, kinds), (other_text, other_kinds) = first, second
    assert text == other_text
    if not (kinds["middle"] and other_kinds["middle"]):  # the server was behind
        kinds["middle"] = other_kinds["middle"] = set()
    assert kinds == other_kinds


def stream(
    web: httpx.Client, request: dict[str, Any], path: str = "/v1/chat/completions"
) -> Stream:
    """The text of each choice of a stream, and its events without their text: the first ones, the
    last ones, and those between."""
    text = web.post(path, json=request, headers=KEY).raise_for_status().text
    lines = [line for line in text.splitlines() if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    texts: dict[int, str] = {}
    kinds: dict[str, set[str]] = {"first": set(), "middle": set(), "last": set()}
    for line in lines:
        chunk = json.loads(line.removeprefix("data: "))
        for name in ("id", "created", "prompt_text"):
            chunk.pop(name, None)
        place = "last"
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice["delta"]
            place = "first" if "role" in delta else "last" if choice["finish_reason"] else "middle"
            texts[index] = texts.get(index, "") + delta.pop("content")
        kinds[place].add(json.dumps(chunk))
    return texts, kinds


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
    secured: Server, manager: socket.socket, certificate: Path
) -> None:
    verify = str(certificate / "cert.pem")
    assert manager.recv(100) == b"READY=1"
    children = secured.children()
    assert len(secured.image_workers()) == 2
    assert secured.named("VLLM::EngineCore")
    answers: list[httpx.Response] = []

    def ask() -> None:
        long = {**REQUEST, "max_tokens": 400, "ignore_eos": True}
        with httpx.Client(base_url=secured.url, verify=verify, timeout=60) as client:
            answers.append(client.post("/v1/chat/completions", json=long, headers=KEY))

    asking = threading.Thread(target=ask)
    with httpx.Client(base_url=secured.url, verify=verify, timeout=60, headers=KEY) as client:
        asking.start()
        wait_for(client, lambda now: value(now, "saccade_requests_in_flight") == 1)
    assert secured.stop(signal.SIGTERM) == 0
    assert "leaked" not in "".join(secured.log)  # what libraries print of objects that live at exit
    assert manager.recv(100) == b"STOPPING=1"
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    assert_nothing_is_left(children)


LONG = {"model": "saccade-tiny", "messages": ASK, "max_tokens": 3500, "ignore_eos": True}
UNAVAILABLE = ("unavailable", "server_error")
REQUESTS_CUT = 3  # the exit status


def running(series: Series) -> float:
    """How many requests the engine works on."""
    return sum(count for (name, _), count in series.items() if name == "vllm:num_requests_running")


def left_behind(server: Server, parent: str = tempfile.gettempdir()) -> list[Path]:
    """The temporary folder of a server and its segments in /dev/shm."""
    (folder,) = [
        lock.parent
        for lock in Path(parent).glob("saccade-run-*/lock")
        if any(file.path == str(lock) for file in psutil.Process(server.process.pid).open_files())
    ]
    name = folder.name.removeprefix("saccade-run-")
    return [folder, *Path("/dev/shm").glob(f"{name}_*")]


def test_the_engine_core_is_a_fork_of_the_server(secured: Server) -> None:
    """A spawned process would have its libraries at other addresses."""
    (core,) = secured.named("VLLM::EngineCore")

    def libraries(pid: int) -> set[str]:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split()[0] for line in lines if "libtorch_cpu" in line}

    assert libraries(core.pid) & libraries(secured.process.pid)


@pytest.mark.ends_server
def test_a_dead_engine_core_fails_its_requests_and_ends_the_server(guarded: Server) -> None:
    """The engine cannot be restarted alone, so a supervisor has to restart the server."""
    check_the_end_of(guarded, "VLLM::EngineCore")


@pytest.mark.ends_server
def test_a_dead_engine_worker_fails_its_requests_and_ends_the_server(
    tight: Server, origin: Origin
) -> None:
    """Another request waits for a picture that does not arrive."""
    origin.delay_s["/never.png"] = STOP_TIMEOUT_S
    part = {"type": "image_url", "image_url": {"url": f"{origin.url}/never.png"}}

    def fetch() -> httpx.Response:
        with client_of(tight) as client:
            return client.post("/v1/chat/completions", json={**LONG, "messages": user(part)})

    with concurrent.futures.ThreadPoolExecutor(1) as threads:

        def begin() -> None:
            fetching.append(threads.submit(fetch))
            until(lambda: bool(origin.requests))

        fetching: list[concurrent.futures.Future[httpx.Response]] = []
        check_the_end_of(tight, "VLLM::Worker", begin)
        check_refused(fetching[0].result(), "unavailable")


def check_the_end_of(server: Server, victim: str, begin: Callable[[], None] = lambda: None) -> None:
    """Kill a process of the engine under a request, streams, pictures, and what `begin` begins."""
    children, files = server.children(), left_behind(server)
    assert len(files) > 1
    with (
        client_of(server) as client,
        requests_running(client) as answers,
        pictures_sent(server) as others,
    ):
        wait_for(client, lambda now: value(now, "saccade_requests_in_flight") > len(STREAMS) + 1)
        begin()
        server.named(victim)[0].kill()
        until(lambda: status_of(server, "/ready") != 200)
        assert status_of(server, "/ready") in (503, None)
        assert server.process.wait(STOP_TIMEOUT_S) == 1
    assert_nothing_is_left(children)
    assert not [file for file in files if file.exists()]
    check_failed(answers, *UNAVAILABLE)
    for answer in others:
        if answer.status_code != 200:
            check_refused(answer, "unavailable", "server_busy")  # before the end as well


def client_of(server: Server) -> httpx.Client:
    headers = {"Authorization": f"Bearer {FLAG}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def status_of(server: Server, path: str) -> int | None:
    """The status of a new connection's answer; None if the port is closed, or closes."""
    with client_of(server) as client, contextlib.suppress(httpx.TransportError):
        return client.get(path).status_code
    return None


def check_refused(response: httpx.Response, *codes: str) -> None:
    assert response.status_code == 503, response.text
    assert response.json()["error"]["code"] in codes
    assert response.headers["Retry-After"]


@contextlib.contextmanager
def pictures_sent(
    server: Server, stop: threading.Event | None = None
) -> Iterator[list[httpx.Response]]:
    """Clients that send pictures which are not cached, until the port is closed or `stop` is set;
    the answers so far, all of which there are at the end."""
    answers: list[httpx.Response] = []

    def send(client_number: int) -> None:
        for number in itertools.count():
            if stop is not None and stop.is_set():
                return
            picture = pictures.encode(pictures.photo((300 + number, 200), client_number))
            body = {**LONG, "messages": user(image_part(picture)), "max_tokens": 2}
            with client_of(server) as client:  # a new connection: no other ends when it is used
                try:
                    answers.append(client.post("/v1/chat/completions", json=body))
                except httpx.ConnectError:
                    return

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        sending = [threads.submit(send, number) for number in range(3)]
        yield answers
        for each in sending:
            each.result()


STREAMS = (False, True, True)


@contextlib.contextmanager
def requests_running(client: httpx.Client) -> Iterator[list[httpx.Response]]:
    """A request and streams that the engine works on when the block begins; their answers are
    there after its end."""
    answers: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        answers.append(client.post("/v1/chat/completions", json={**LONG, "stream": stream}))

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in STREAMS]
    for thread in asking:
        thread.start()
    try:
        wait_for(client, lambda now: running(now) == len(STREAMS))
        yield answers
    finally:
        for thread in asking:
            thread.join()


def check_failed(answers: list[httpx.Response], code: str, type_: str) -> None:
    """The whole answer is a 503, and each stream ends with an error event."""
    (whole,) = [answer for answer in answers if answer.status_code == 503]
    assert whole.headers["Retry-After"]
    errors = [whole.json()["error"]]
    for streamed in [answer for answer in answers if answer.status_code == 200]:
        lines = streamed.text.splitlines()
        (event,) = [line for line in lines if line.startswith('data: {"error"')]
        errors.append(json.loads(event.removeprefix("data: "))["error"])
    assert [(error["code"], error["type"]) for error in errors] == [(code, type_)] * len(STREAMS)


@pytest.mark.ends_server
def test_a_second_signal_cuts_requests_off_and_leaves_nothing(server: Server) -> None:
    children, files = server.children(), left_behind(server)
    assert len(files) > 1
    web = httpx.Client(base_url=server.url, timeout=60)
    with web as client, requests_running(client) as answers:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not listens(server.url))
        assert server.stop(signal.SIGTERM) == REQUESTS_CUT
    assert_nothing_is_left(children)
    assert not [file for file in files if file.exists()]
    check_failed(answers, "server_busy", "server_error")


def listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=60)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        return True  # the connection has ended with the port; the next one will be refused
    return True


def test_an_engine_that_stops_makes_the_server_unavailable_until_it_goes_on() -> None:
    # In a folder of its own: other servers that start meanwhile would remove what this one leaves.
    with tempfile.TemporaryDirectory() as folder:
        with serving("--engine-stall-timeout-s", "3", TMPDIR=folder) as server:
            files = left_behind(server, folder)
            with httpx.Client(base_url=server.url, timeout=60) as client:
                with requests_running(client) as answers, server.engine_held():
                    for path in ("/health", "/ready"):
                        until(lambda path=path: client.get(path).status_code == 503)
                        assert client.get(path).json()["error"]["code"] == "unavailable"
                    refused = client.post("/v1/chat/completions", json={**LONG, "stream": True})
                    assert refused.status_code == 503
                    assert refused.json()["error"]["code"] == "unavailable"
                    until(lambda: len(answers) == len(STREAMS))  # though the engine is still held
                check_failed(answers, *UNAVAILABLE)
                assert "the engine does not answer" in "".join(answer.text for answer in answers)
                until(lambda: client.get("/health").status_code == 200)
                answer = client.post("/v1/chat/completions", json={**LONG, "max_tokens": 2})
                assert answer.status_code == 200
                wait_for(client, lambda now: running(now) == 0)  # the engine dropped the others
            children = server.children()
            server.process.kill()  # nothing is cleaned up
            server.process.wait()
            assert_nothing_is_left(children)
            assert files[0].exists()
            assert len(files) > 1
        remove_left(files[0].parent)  # as the next start does
        assert not [file for file in files if file.exists()]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


STAGES = ["loading vLLM", "reading the model", "starting the engine"]


@pytest.mark.parametrize("stage", STAGES)
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
    if stage != "reading the model":  # which takes a moment
        time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:  # further signals neither hasten nor disturb the end
        process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert "stopped during start-up" in errors
    assert "Traceback" not in errors
    assert process.returncode == 130
    assert_nothing_is_left(children)


# Refused commands: {command: (environment, exit status, text on standard error)}.
REFUSED: dict[str, tuple[dict[str, str], int, str]] = {
    "serve --no-such-flag": ({}, 2, "--no-such-flag"),
    "serve --image-workers none": ({}, 2, "image_workers"),
    "serve": ({"SACCADE_IMAGE_WORKRES": "2"}, 2, "SACCADE_IMAGE_WORKRES"),
    "serve --headless": ({}, 2, "--headless is not supported"),
    "serve --api-server-c 2": ({}, 1, "write the flag for several front ends as"),
    "serve --api-server-count 65": ({}, 2, "--api-server-count must be 1 to 64"),
    "run-batch -i a -o b --api-server-count 2": ({}, 2, "has one process"),
    "sevre": ({}, 2, "No such command 'sevre'"),
    "serve --port 0 --allowed-private-media 10.0.0.0/99": ({}, 1, "10.0.0.0/99"),
}
SHOWN = {
    "--help": r"serve +Serve a model",
    "--version": r"\Asaccade \d+\.\d+\.\d+\n\Z",
    "serve --help": r"--fetch-timeout-s(.|\n)+--help=all",
    "serve --help=Saccade": r"--fetch-timeout-s(.|\n)+--image-workers",
}


def ended(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The result of a command that exits by itself."""
    env = {**os.environ, **environment}
    return template().run("tests.starts:saccade", *command.split(), env=env)


@pytest.mark.parametrize("command", REFUSED)
def test_an_invalid_command_exits_with_a_clear_error(command: str) -> None:
    environment, status, message = REFUSED[command]
    done = ended(command, **environment)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", SHOWN)
def test_help_and_version_are_printed(command: str) -> None:
    done = ended(command)
    assert done.returncode == 0
    assert re.search(SHOWN[command], done.stdout)


def test_a_port_in_use_stops_the_start_up_with_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = ended(f"serve --host 127.0.0.1 --port {taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "cannot start" in done.stderr
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr

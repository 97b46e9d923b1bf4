"""Several front ends over one engine: they act as one server, and survive each other."""

import contextlib
import json
import os
import signal
import ssl
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
from openai import OpenAI

from tests.conftest import STOP_TIMEOUT_S, Server, assert_nothing_is_left, serving
from tests.pictures import encode, image_part, photo, shape, text_part, user
from tests.scrape import FRESH, scrape, value, wait_for
from tests.starts import ENGINES

# Not with the tests of the server that many files share, which has the same name.
pytestmark = pytest.mark.group(__name__)

A, FEW, ADMIN = "sk-of-a", "sk-of-few", "sk-of-admin"
KEYS = {"groups": {"team-a": [A], "few": [{"key": FEW, "requests_per_minute": 3}]}}
CHAT = "/v1/chat/completions"
WHAT = text_part("What is in the image?")
RED = encode(shape("red"))
FIRST, SECOND = 0, 1
PATIENCE_S = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two front ends, with uploaded files, keys and the embedding cache."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps({**KEYS, "admin": [ADMIN]}))
    files = tmp_path_factory.mktemp("files")
    with serving(
        *("--api-server-count", "2", "--max-model-len", "4096"),
        *("--api-keys-file", str(keys), "--files", "--files-dir", str(files)),
    ) as running:
        yield running


def front_end(server: Server, index: int) -> psutil.Process:
    (found,) = server.named(f"SACCADE::FrontEnd_{index}")
    return found


@contextlib.contextmanager
def connected(server: Server, index: int, key: str = A) -> Iterator[httpx.Client]:
    """A client with a connection to this front end."""
    process = front_end(server, index)
    headers = {"Authorization": f"Bearer {key}"}
    with contextlib.ExitStack() as stack:
        for _ in range(100):  # the open ones make the next go to the other
            client = httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S)
            stack.enter_context(client)
            with client.stream("GET", "/version") as answer:
                answer.read()
                stream = answer.extensions["network_stream"]
                port = stream.get_extra_info("client_addr")[1]
            ends = process.net_connections("tcp")
            if any(each.raddr and each.raddr.port == port for each in ends):
                yield client
                return
    raise AssertionError("no connection reaches this front end")


def ask(client: httpx.Client, *parts: dict[str, Any], **options: Any) -> httpx.Response:
    body = {"model": "saccade-tiny", "messages": user(*parts), "temperature": 0, **options}
    return client.post(CHAT, json=body)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def sdk(client: httpx.Client, server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=A, max_retries=0, http_client=client)


@contextlib.contextmanager
def long_answer(client: httpx.Client, tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a stream whose first event has arrived."""
    body = {
        **{"model": "saccade-tiny", "messages": user(text_part("Hello")), "stream": True},
        **{"max_tokens": tokens, "ignore_eos": True},
    }
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def until_ready_again(server: Server, index: int, killed: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        found = server.named(f"SACCADE::FrontEnd_{index}")
        if found and found[0].pid != killed and _answers(server, index):
            return
        time.sleep(0.2)
    raise AssertionError("".join(server.log[-40:]))


def _answers(server: Server, index: int) -> bool:
    try:
        with connected(server, index):
            return True
    except (AssertionError, httpx.HTTPError, psutil.Error):
        return False


def test_all_answer_equally_and_know_repeats(server: Server) -> None:
    pictures = [RED, encode(photo((640, 480), 5), "JPEG")]
    for picture in pictures:
        found = []
        for index in (FIRST, SECOND):
            with connected(server, index) as client:
                found += [text_of(ask(client, image_part(picture), WHAT)) for _ in range(3)]
        assert len(set(found)) == 1


def test_front_ends_share_the_image_workers(server: Server) -> None:
    assert len(server.image_workers()) == 2
    with connected(server, SECOND) as client:
        series = scrape(client)
    assert value(series, "saccade_image_workers") == 2
    assert value(series, "saccade_front_ends") == 2
    assert value(series, "saccade_ready") == 1


def test_metrics_are_those_of_all(server: Server) -> None:
    with connected(server, FIRST) as one, connected(server, SECOND) as other:
        before = scrape(one)
        for client in (one, other, other):
            assert text_of(ask(client, text_part("Hello"), max_tokens=3))
        name, labels = "saccade_requests_total", {"outcome": "answered"}
        wait_for(other, lambda now: value(now, name, **labels) >= value(before, name, **labels) + 3)
        after = scrape(one)
        assert value(after, name, **labels) == value(before, name, **labels) + 3
        tokens = "vllm:generation_tokens_total"
        of = next(dict(found) for key, found in after if key == tokens)
        assert value(after, tokens, **of) == value(before, tokens, **of) + 9
        assert value(after, "vllm:num_requests_running", **of) == 0
        part = other.get("/metrics/?name[]=saccade_ready", headers=FRESH).text.splitlines()
        assert [line for line in part if not line.startswith("#")] == ["saccade_ready 1.0"]


def test_an_uploaded_file_is_known_to_all(server: Server) -> None:
    with connected(server, FIRST) as first, connected(server, SECOND) as second:
        uploaded = sdk(second, server).files.create(file=("a.png", RED), purpose="vision")
        part = {"type": "image_url", "image_url": {"file_id": uploaded.id}}
        answers = {text_of(ask(client, part, WHAT)) for client in (first, second)}
        assert len(answers) == 1
        for client in (first, second):
            files = sdk(client, server).files
            assert [file.id for file in files.list()] == [uploaded.id]
            assert files.content(uploaded.id).read() == RED
        assert second.delete(f"/v1/files/{uploaded.id}").status_code == 200
        for client in (first, second):
            refused = ask(client, part, WHAT)
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == "file_not_found"


def test_files_of_other_groups_stay_unknown(server: Server) -> None:
    with connected(server, SECOND) as client, connected(server, SECOND, ADMIN) as other:
        uploaded = sdk(client, server).files.create(file=("a.png", RED), purpose="vision")
        part = {"type": "image_url", "image_url": {"file_id": uploaded.id}}
        assert ask(other, part, WHAT).status_code == 404
        missing = {"type": "image_url", "image_url": {"file_id": "../../lock"}}
        assert ask(client, missing, WHAT).status_code == 404
        client.delete(f"/v1/files/{uploaded.id}")


def test_a_batch_is_run_once_and_seen_by_all(server: Server) -> None:
    lines = [
        json.dumps(
            {
                **{"custom_id": f"{number}", "method": "POST", "url": CHAT},
                "body": {
                    **{"model": "saccade-tiny", "max_tokens": 2},
                    "messages": user(text_part(f"{number}")),
                },
            }
        )
        for number in range(8)
    ]
    with connected(server, FIRST) as first, connected(server, SECOND) as second:
        openai = sdk(second, server)
        file = openai.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        deadline = time.monotonic() + PATIENCE_S
        while batch.status != "completed":
            assert time.monotonic() < deadline, batch
            time.sleep(0.1)
            batch = sdk(first, server).batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        found = openai.files.content(batch.output_file_id).text.splitlines()
        assert sorted(json.loads(text)["custom_id"] for text in found) == list("01234567")


def test_an_image_named_by_uuid_works_or_has_to_be_sent_again(server: Server) -> None:
    named = {"type": "image_url", "image_url": None, "uuid": "my picture"}
    whole = {**image_part(RED), "uuid": "my picture"}
    with connected(server, FIRST) as first, connected(server, SECOND) as second:
        answer = text_of(ask(first, whole, WHAT))
        assert text_of(ask(first, named, WHAT)) == answer
        refused = ask(second, named, WHAT)
        assert refused.json()["error"]["code"] == "unknown_image"
        assert text_of(ask(second, whole, WHAT)) == answer
        assert text_of(ask(second, named, WHAT)) == answer


def test_limits_of_keys_are_counted_together(server: Server) -> None:
    with connected(server, FIRST, FEW) as first, connected(server, SECOND, FEW) as second:
        for client in (first, second, second):
            assert ask(client, text_part("Hello"), max_tokens=1).status_code == 200
        for client in (first, second):
            refused = ask(client, text_part("Hello"), max_tokens=1)
            assert refused.status_code == 429
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_caches_are_shown_and_cleared_everywhere(server: Server) -> None:
    picture = image_part(encode(photo((320, 240), 9), "JPEG"))
    with connected(server, FIRST, ADMIN) as first, connected(server, SECOND, ADMIN) as second:
        assert first.delete("/v1/cache").status_code == 200
        answers = {text_of(ask(client, picture, WHAT)) for client in (first, second)}
        for client in (first, second):
            found = client.get("/v1/cache").raise_for_status().json()
            assert found["features"]["entries"] == 2
            assert "gpu" in found["embeddings"]
        assert "features" in second.delete("/v1/cache").json()["cleared"]
        assert first.get("/v1/cache").json()["features"]["entries"] == 0
        answers |= {text_of(ask(client, picture, WHAT)) for client in (second, first, second)}
        assert len(answers) == 1


@pytest.mark.parametrize("index", [SECOND, FIRST])
def test_the_others_survive_a_kill_and_it_comes_back(server: Server, index: int) -> None:
    other = SECOND if index == FIRST else FIRST
    picture = image_part(encode(photo((400, 300), 11 + index), "JPEG"))
    with connected(server, other) as client:
        uploaded = sdk(client, server).files.create(file=("a.png", RED), purpose="vision")
    with connected(server, index) as lost, connected(server, other) as kept:
        answer = text_of(ask(lost, picture, WHAT))
        assert text_of(ask(kept, picture, WHAT)) == answer
        with long_answer(kept, 600) as going_on, long_answer(lost, 3500) as broken:
            killed = front_end(server, index)
            killed.kill()
            with pytest.raises(httpx.HTTPError):
                list(broken)
            assert "data: [DONE]" in list(going_on)
        assert text_of(ask(kept, picture, WHAT)) == answer
    until_ready_again(server, index, killed.pid)
    with connected(server, index) as client:
        # The request of the one that was killed does not go on without it.
        wait_for(client, lambda now: _running(now) == 0, PATIENCE_S)
        series = scrape(client)
        assert value(series, "saccade_front_end_restarts_total") >= 1
        assert value(series, "saccade_front_ends") == 2
        assert [text_of(ask(client, picture, WHAT)) for _ in range(3)] == [answer] * 3
        part = {"type": "image_url", "image_url": {"file_id": uploaded.id}}
        assert text_of(ask(client, part, WHAT))
        assert client.delete(f"/v1/files/{uploaded.id}").status_code == 200
    assert len(server.image_workers()) == 2


def _running(series: dict[Any, float]) -> float:
    return sum(
        number for (name, _), number in series.items() if name == "vllm:num_requests_running"
    )


def test_ctrl_c_ends_all_after_their_answers(server: Server) -> None:
    """A terminal sends SIGINT to the whole process group."""
    children = server.children()
    ended: list[int] = []
    with connected(server, FIRST) as one, connected(server, SECOND) as other:
        with long_answer(one, 400) as first, long_answer(other, 400) as second:
            os.killpg(server.process.pid, signal.SIGINT)
            waiting = threading.Thread(
                target=lambda: ended.append(server.process.wait(STOP_TIMEOUT_S))
            )
            waiting.start()
            for lines in (first, second):
                assert "data: [DONE]" in list(lines)
        waiting.join()
    assert ended == [0], "".join(server.log[-20:])
    assert_nothing_is_left(children)


def test_several_engines_answer_over_tls_and_a_unix_socket_and_the_end_of_one_ends_all(
    certificate: Path, tmp_path: Path
) -> None:
    with serving(
        *("--api-server-count", "2", "--data-parallel-size", "2", "--max-model-len", "1024"),
        *("--ssl-keyfile", str(certificate / "key.pem"), "--uds", str(tmp_path / "socket")),
        *("--ssl-certfile", str(certificate / "cert.pem")),
    ) as server:
        trusted = ssl.create_default_context(cafile=certificate / "cert.pem")
        over = httpx.HTTPTransport(verify=trusted, uds=str(tmp_path / "socket"))
        with httpx.Client(transport=over, base_url="https://127.0.0.1") as client:
            answers = {text_of(ask(client, image_part(RED), WHAT)) for _ in range(4)}
            assert len(answers) == 1
            assert value(scrape(client), "saccade_front_ends") == 2
        children = server.children()
        engines = server.named("VLLM::EngineCore")
        assert len(engines) == 2
        engines[0].kill()
        assert server.process.wait(STOP_TIMEOUT_S) == 1
        assert "the engine has died" in "".join(server.log)
        assert_nothing_is_left(children)


@pytest.mark.parametrize("stage", ["reading the model", "front ends"])
def test_a_signal_during_start_up_leaves_no_process(stage: str) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--api-server-count", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | ENGINES
    )
    assert process.stderr is not None
    while stage not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert "stopped during start-up" in errors
    assert "Traceback" not in errors
    assert process.returncode == 130
    assert_nothing_is_left(children)

"""Batches with the real engine: over the API with OpenAI's SDK, past a kill, and `run-batch`."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.conftest import Server, serving
from tests.pictures import encode, image_part, shape, text_part, user
from tests.starts import template

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATIENCE_S = 120


def line(custom_id: str, url: str, **body: Any) -> bytes:
    request = {"custom_id": custom_id, "method": "POST", "url": url}
    return json.dumps({**request, "body": {"model": "saccade-tiny", **body}}).encode() + b"\n"


def one_token(number: int) -> bytes:
    return line(f"item-{number}", COMPLETIONS, prompt=f"{number} and", max_tokens=1)


def create(client: OpenAI, text: bytes, endpoint: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", text), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"of": "test"}
    )


def until(
    client: OpenAI, batch: Batch, is_reached: Callable[[Batch], bool] = lambda batch: False
) -> Batch:
    """The batch when it is over, or at another moment."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = client.batches.retrieve(batch.id)
        if is_reached(found) or found.status in ("completed", "failed", "expired", "cancelled"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def results(client: OpenAI, file_id: str | None) -> dict[str, Any]:
    """The results in a file by custom id, each of which is there once."""
    if file_id is None:
        return {}
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


# ---------------------------------------------------------------------- the API


def test_a_batch_of_pictures_is_answered_as_over_http(client: OpenAI) -> None:
    messages = user(image_part(encode(shape("red"))), text_part("What color is the shape?"))
    image = client.files.create(file=("a.png", encode(shape("blue"))), purpose="vision")
    uploaded = user(
        {"type": "image_url", "image_url": {"file_id": image.id}},
        text_part("What color is the shape?"),
    )
    damaged = user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})
    made = create(
        client,
        line("sent", CHAT, messages=messages, temperature=0)
        + line("uploaded", CHAT, messages=uploaded, temperature=0)
        + line("damaged", CHAT, messages=damaged)
        + line("unknown", CHAT, messages=messages, model="another"),
        CHAT,
    )
    assert (made.status, made.endpoint, made.metadata) == ("validating", CHAT, {"of": "test"})
    over = until(client, made)
    assert over.status == "completed"
    assert over.request_counts is not None
    assert (over.request_counts.completed, over.request_counts.failed) == (2, 2)
    good, bad = results(client, over.output_file_id), results(client, over.error_file_id)
    used = [each["response"]["body"]["usage"] for each in good.values()]
    assert over.usage is not None
    assert over.usage.input_tokens == sum(each["prompt_tokens"] for each in used)
    assert over.usage.output_tokens == sum(each["completion_tokens"] for each in used)
    assert over.usage.total_tokens == over.usage.input_tokens + over.usage.output_tokens
    assert over.usage.input_tokens_details.cached_tokens == sum(
        each["prompt_tokens_details"]["cached_tokens"] for each in used
    )
    assert over.model == "saccade-tiny"
    direct: Any = client.chat.completions.create(
        model="saccade-tiny", messages=messages, temperature=0
    )
    answer = good["sent"]["response"]
    assert answer["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
    assert answer["body"]["usage"]["prompt_tokens"] == direct.usage.prompt_tokens
    assert "blue" in good["uploaded"]["response"]["body"]["choices"][0]["message"]["content"]
    refusal = bad["damaged"]["response"]
    assert (refusal["status_code"], refusal["body"]["error"]["param"]) == (
        400,
        "messages[0].content[0].image_url",
    )
    assert bad["unknown"]["response"]["status_code"] == 404
    assert made.id in [batch.id for batch in client.batches.list()]
    client.files.delete(image.id)


def test_a_long_batch_is_cancelled(client: OpenAI, server: Server) -> None:
    text = b"".join(
        line(f"item-{n}", COMPLETIONS, prompt=f"{n}", max_tokens=2000, ignore_eos=True)
        for n in range(60)
    )
    made = create(client, text, COMPLETIONS)
    until(client, made, lambda batch: batch.status == "in_progress")
    answer = client.completions.create(model="saccade-tiny", prompt="mine", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert client.batches.cancel(made.id).status == "cancelling"
    over = until(client, made)
    assert over.status == "cancelled"
    assert len(results(client, over.error_file_id)) == 60
    deadline = time.monotonic() + 20
    while (running := _running(server)) != "0":
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


def _running(server: Server) -> str:
    text = httpx.get(f"{server.url}/metrics").text
    name = "saccade_requests_running "
    return next(found[len(name) :] for found in text.splitlines() if found.startswith(name)).split(
        "."
    )[0]


@pytest.mark.parametrize("endpoint", ["/v1/embeddings", "/v1/models", "/v1/messages"])
def test_an_endpoint_that_the_model_does_not_have_is_refused(
    http: httpx.Client, endpoint: str
) -> None:
    given = {"input_file_id": "file-0", "endpoint": endpoint, "completion_window": "24h"}
    answer = http.post("/v1/batches", json=given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "endpoint")


# ---------------------------------------------------------------------- a killed server


@pytest.mark.group("batches")
def test_a_batch_of_1000_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    flags = ("--files", "--files-dir", str(tmp_path), "--max-model-len", "1024")
    with serving(*flags) as server:
        client = _client(server)
        made = create(client, b"".join(map(one_token, range(1000))), COMPLETIONS)
        before = until(client, made, lambda batch: _completed(batch) >= 300)
        assert before.status == "in_progress"
        server.stop(signal.SIGKILL)
    with serving(*flags) as server:
        client = _client(server)
        after = client.batches.retrieve(made.id)
        assert _completed(after) >= _completed(before)
        over = until(client, made)
        assert (over.status, over.error_file_id, _completed(over)) == ("completed", None, 1000)
        assert over.usage is not None
        assert over.usage.output_tokens == 1000
        found = results(client, over.output_file_id)
        assert found.keys() == {f"item-{number}" for number in range(1000)}
        assert len({each["response"]["request_id"] for each in found.values()}) == 1000
        assert all(
            each["response"]["body"]["usage"]["completion_tokens"] == 1 for each in found.values()
        )


def _client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _completed(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed


# ---------------------------------------------------------------------- run-batch


@pytest.mark.group("batches")
def test_run_batch_goes_on_after_a_kill_and_keeps_the_order(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    chat = line("chat", CHAT, messages=user(text_part("Hello")), max_tokens=2)
    wrong = line("wrong", CHAT, messages=[], max_tokens=2)
    source.write_bytes(b"".join(map(one_token, range(600))) + chat + wrong)
    words = ("run-batch", "-i", str(source), "-o", str(output), "--max-model-len", "1024")
    with (tmp_path / "log").open("wb") as log:
        process = template().start(
            "tests.starts:saccade", *words, output=log.fileno(), errors=log.fileno()
        )
    deadline = time.monotonic() + PATIENCE_S
    while not _lines_of(output.parent):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # so that it is not over before the next one begins
    second = template().run("tests.starts:saccade", *words)
    assert second.returncode == 1
    assert f"another process writes its results to {output}" in second.stderr
    process.kill()
    process.wait(10)
    assert not output.exists()
    kept = _lines_of(output.parent)
    ended = template().run("tests.starts:saccade", *words)
    assert ended.returncode == 0, ended.stderr
    assert f"{kept} of 602 requests have been answered before" in ended.stderr
    found = [json.loads(text) for text in output.read_text().splitlines()]
    names = [*(f"item-{number}" for number in range(600)), "chat", "wrong"]
    assert [each["custom_id"] for each in found] == names
    assert [each["response"]["status_code"] for each in found] == [200] * 601 + [400]
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def _lines_of(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.partial/*"))


@pytest.mark.group("batches")
def test_run_batch_names_the_wrong_lines_of_its_input(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(one_token(0) + b"{\n" + one_token(0))
    words = ("run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"))
    ended = template().run("tests.starts:saccade", *words)
    assert ended.returncode == 1
    assert "line 2: the line is not a JSON object" in ended.stderr
    assert "line 3: another line has the same custom_id" in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()

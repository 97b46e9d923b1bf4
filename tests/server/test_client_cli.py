"""The commands `saccade ask`, `chat`, `tokens`, `models`, `top` and `batch` against the server."""

import contextlib
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from saccade_client import Client
from tests import pictures
from tests.conftest import Server
from tests.pictures import shape

WHAT = "What is in the image?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(pictures.encode(shape("red")))
    (tmp_path / "blue.jpg").write_bytes(pictures.encode(shape("blue", size=(640, 480)), "JPEG"))
    return tmp_path


def saccade(server: Server, folder: Path, *words: str, **more: Any) -> Any:
    """A command that has ended, with the output as text."""
    environment = os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1"}
    done = subprocess.run(
        [sys.executable, "-m", "server", *words],
        cwd=folder, env=environment, capture_output=True, timeout=60, **more,
    )  # fmt: skip
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def test_a_question_about_files(server: Server, folder: Path) -> None:
    done = saccade(server, folder, "ask", "red.png", WHAT, "--temperature", "0", "--usage")
    assert (done.returncode, done.stdout) == (0, "a red circle\n")
    assert re.fullmatch(r"\d+ tokens in, 49 of pictures; 4 out\n", done.stderr)
    which = "What is in the second image?"
    done = saccade(server, folder, "ask", "red.png", "blue.jpg", which, "--temperature", "0")
    assert done.stdout == "a blue circle\n"


def test_a_picture_comes_from_standard_input(server: Server, folder: Path) -> None:
    data = (folder / "red.png").read_bytes()
    done = saccade(server, folder, "ask", "-", WHAT, "--json", input=data)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == "a red circle"
    assert answer["image_details"][0]["width"] == 224


def test_boxes_are_drawn_into_a_file(server: Server, folder: Path) -> None:
    where = "Where is the circle? Answer with a box."
    words = ("ask", "red.png", where, "--boxes", "drawn.png", "--max-tokens", "32")
    done = saccade(server, folder, *words)
    assert done.returncode == 0
    assert "boxes in drawn.png" in done.stderr
    with Image.open(folder / "drawn.png") as drawn:
        assert drawn.size == (224, 224)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["ask", "none.png", WHAT], 2, "cannot read none.png: No such file"),
        (["ask", "empty.png", WHAT], 2, "empty.png is empty"),
        (["ask", "-", WHAT], 2, "standard input is empty"),
        (["ask"], 2, "Missing argument"),
        (["ask", "red.png"], 2, "the question is missing: red.png is a file"),
        (["ask", "red.png", WHAT, "--max-tokens", "0"], 2, "max-tokens"),
        (["ask", "red.png", WHAT, "--model", "none"], 1, "`none` does not exist"),
        (["ask", "red.png", WHAT, "--image-tokens", "1", "--max-tokens", "99999"], 1, "99999"),
        (["tokens", "damaged.png"], 1, "damaged"),
        (["tokens", "red.png", "damaged.png"], 1, "]: damaged.png"),
        (["ask", "red.png", b"h\xe9".decode(errors="surrogateescape")], 2, "not UTF-8"),
        (
            ["models", "--url", "http://127.0.0.1:1/v1"],
            3,
            "Connection refused (at http://127.0.0.1:1",
        ),
        (["models", "--url", "127.0.0.1:8000"], 2, "--url must begin with http://"),
        (["ask", "red.png", WHAT, "--timeout", "0.001"], 3, "answer"),
    ],
)
def test_a_failure_has_a_message_and_a_status(
    server: Server, folder: Path, words: list[str], status: int, message: str
) -> None:
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (folder / "empty.png").touch()
    done = saccade(server, folder, *words, input=b"")
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chat_reads_questions_from_a_pipe(server: Server, folder: Path) -> None:
    questions = f"{WHAT}\nWhat color is the shape?\n/clear\n/image blue.jpg\n{WHAT}\n"
    words = ("chat", "red.png", "--temperature", "0")
    done = saccade(server, folder, *words, input=questions.encode())
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["a red circle", "red", "a blue circle"]


class Terminal:
    """A command in a terminal."""

    def __init__(self, url: str, folder: Path, *words: str, columns: int = 80) -> None:
        self._leader, follower = pty.openpty()
        termios.tcsetwinsize(follower, (24, columns))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", *words],
            cwd=folder, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            env=os.environ | {"OPENAI_BASE_URL": f"{url}/v1", "TERM": "vt100"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(follower)

    def type(self, text: str, expected: str = "") -> None:
        """Write `text`, and read until `expected` was printed."""
        os.write(self._leader, text.encode())
        deadline, seen = time.monotonic() + 30, ""
        while expected not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(self._leader, 4096).decode(errors="replace")

    def end(self, text: str) -> int:
        """Write `text`; returns the exit status."""
        self.type(text)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self._leader)


def test_a_chat_in_a_terminal_survives_errors(server: Server, folder: Path) -> None:
    terminal = Terminal(server.url, folder, "chat", "red.png", "--temperature", "0")
    terminal.type("/image none.png\n", "cannot read none.png")
    terminal.type(f"{WHAT}\n", "a red circle")
    terminal.type("/what\n", "adds a picture")
    assert terminal.end("/quit\n") == 0


def test_top_in_a_terminal_ends_with_ctrl_c(server: Server, folder: Path) -> None:
    terminal = Terminal(server.url, folder, "top", "--interval", "0.3")
    terminal.type("", "time to first token")
    assert terminal.end("\x03") == 0


@contextlib.contextmanager
def metrics(port: int = 0) -> Iterator[int]:
    """A server with a metric, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"saccade_ready 1.0\n")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        yield serving.server_address[1]
        serving.shutdown()


def test_top_waits_for_a_server_that_restarts(folder: Path) -> None:
    with metrics() as port:
        terminal = Terminal(f"http://127.0.0.1:{port}", folder, "top", "--interval", "0.1")
        terminal.type("", "image workers")
    terminal.type("", "trying again")
    with metrics(port):
        terminal.type("", "image workers")
        assert terminal.end("\x03") == 0


def test_costs_are_shown(server: Server, folder: Path) -> None:
    done = saccade(server, folder, "tokens", "red.png", "blue.jpg")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[0][:4] == ["red.png", "224x224", "224x224", "49"]
    assert rows[1][:4] == ["blue.jpg", "640x480", "640x480", "300"]
    assert rows[2] == ["all", "", "", "349", ""]
    done = saccade(server, folder, "tokens", "blue.jpg", "--json", "--image-tokens", "100")
    assert json.loads(done.stdout)["tokens"] <= 100


def test_a_full_disk_and_a_wrong_address_are_told_in_a_line(server: Server, folder: Path) -> None:
    words = [sys.executable, "-m", "server", "models", "--json", "--url"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*words, f"{server.url}/v1"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "saccade: No space left on device\n")
    done = subprocess.run([*words, server.url], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the address of an API ends with /v1" in done.stderr


def test_no_figure_is_cut_in_a_narrow_terminal(server: Server, folder: Path) -> None:
    terminal = Terminal(server.url, folder, "tokens", "blue.jpg", columns=20)
    terminal.type("", "0.6 MiB")
    assert terminal.process.wait(30) == 0
    terminal = Terminal(server.url, folder, "top", "--interval", "0.1", columns=20)
    terminal.type("", " 2 ")  # image workers
    assert terminal.end("\x03") == 0


def test_models_are_listed(server: Server, folder: Path) -> None:
    assert saccade(server, folder, "models").stdout == "saccade-tiny\tvllm\t4096\n"
    (model,) = json.loads(saccade(server, folder, "models", "--json").stdout)
    assert model["id"] == "saccade-tiny"


def test_top_shows_what_happens(server: Server, folder: Path) -> None:
    words = ("top", "--once", "--interval", "2")
    environment = os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1"}
    with (
        subprocess.Popen(
            [sys.executable, "-m", "server", *words, "--json"],
            env=environment,
            stdout=subprocess.PIPE,
        ) as watching,
        Client(f"{server.url}/v1", reuse=False) as client,
    ):
        while watching.poll() is None:
            client.ask(WHAT, folder / "red.png")
        assert watching.stdout is not None
        row = json.loads(watching.stdout.read())
    assert row["requests_per_s"] > 0
    assert row["time_to_first_token_ms"] > 0
    assert row["images_per_s"] > 0
    assert row["image_workers"] == 2
    assert {"kv_cache_share", "embeddings_from_gpu_per_s", "refused_per_s"} <= row.keys()


def test_a_batch_answers_in_order(server: Server, folder: Path) -> None:
    asked = [("red.png", "a red circle"), ("blue.jpg", "a blue circle")] * 5
    (folder / "in.jsonl").write_text(
        "".join(
            json.dumps({"question": WHAT, "files": [name], "temperature": 0}) + "\n"
            for name, _ in asked
        )
    )
    assert saccade(server, folder, "batch", "in.jsonl", "out.jsonl").returncode == 0
    lines = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    bodies = [line["response"]["body"] for line in lines]
    assert [body["choices"][0]["message"]["content"] for body in bodies] == [
        answer for _, answer in asked
    ]
    assert [body["image_details"][0]["width"] for body in bodies] == [224, 640] * 5

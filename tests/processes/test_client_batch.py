"""The client's batches, against a web server that echoes the question: order, bounds, resuming."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from saccade_client import batch, lock
from saccade_client.errors import SaccadeError
from tests import pictures

RED = pictures.encode(pictures.shape("red"))


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run the client of this checkout, whichever is installed."""
    folder = str(Path(batch.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)


@dataclass
class Server:
    """Counts the questions. Those in `refused` get a 400, and at those in `cut_off` the connection
    is closed; the time of an answer is `delay_s`."""

    url: str = ""
    delay_s: float = 0
    refused: set[str] = field(default_factory=set)
    cut_off: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    bodies: list[Any] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "m"}], "version": "1"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][-1]["content"]
            text = content if isinstance(content, str) else content[-1]["text"]
            with lock:
                server.bodies.append(body)
                server.asked.append(text)
                server.running += 1
                server.most_running = max(server.most_running, server.running)
            time.sleep(server.delay_s * (1 + int(text) % 3))
            with lock:
                server.running -= 1
            if text in server.cut_off:
                self.close_connection = True
                return None
            if text in server.refused:
                return self._send(400, {"error": {"message": "no", "code": "bad"}})
            message = {"role": "assistant", "content": f"answer {text}"}
            return self._send(200, {"choices": [{"index": 0, "message": message}]})

        def _send(self, status: int, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Serving(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """The client may have been killed."""

    with Serving(("127.0.0.1", 0), Handler) as serving:
        server.url = f"http://127.0.0.1:{serving.server_address[1]}/v1"
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        serving.shutdown()


def lines(count: int) -> str:
    return "".join(
        json.dumps({"custom_id": f"r{n}", "question": str(n), "temperature": 0}) + "\n"
        for n in range(count)
    )


def command(server: Server, *words: str) -> list[str]:
    return [sys.executable, "-m", "saccade_client", "batch", *words, "--url", server.url]


def run(server: Server, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(server, *words), capture_output=True, text=True, timeout=60, **more
    )


def results(text: str) -> list[tuple[str, str]]:
    """Id and answer, or code of the error, of each line."""
    found = []
    for line in map(json.loads, text.splitlines()):
        body = line["response"]["body"]
        said = body["choices"][0]["message"]["content"] if line["error"] is None else None
        found.append((line["custom_id"], said or line["error"]["code"]))
    return found


ANSWERS = [(f"r{n}", f"answer {n}") for n in range(40)]


def test_results_have_the_order_of_the_requests(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.2
    (tmp_path / "in.jsonl").write_text(lines(40))
    done = run(server, "in.jsonl", "out.jsonl", "-c", "8", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert results((tmp_path / "out.jsonl").read_text()) == ANSWERS
    assert server.most_running == 8
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_pipes_have_the_order_of_the_requests(server: Server) -> None:
    server.delay_s = 0.2
    done = run(server, "-", "-", "-c", "8", input=lines(40))
    assert (done.returncode, done.stderr) == (0, "")
    assert results(done.stdout) == ANSWERS
    assert server.most_running == 8


def test_a_killed_batch_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.05
    (tmp_path / "in.jsonl").write_text(lines(40))
    words = ("in.jsonl", "out.jsonl", "-c", "2")
    with subprocess.Popen(command(server, *words), cwd=tmp_path) as process:
        while len(server.asked) < 10:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    journal = tmp_path / "out.jsonl.partial"
    kept = results(journal.read_text())
    assert 5 <= len(kept) < 20
    with journal.open("a") as file:
        file.write('{"custom_id": "r39", "res')  # as a full disk cuts a line off
    server.asked.clear()
    server.delay_s = 0
    assert run(server, *words, cwd=tmp_path).returncode == 0
    assert results((tmp_path / "out.jsonl").read_text()) == ANSWERS
    # One that the killed process has sent may be read only now.
    assert {f"r{text}" for text in server.asked} == dict(ANSWERS).keys() - dict(kept).keys()
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_failed_requests_are_tried_again_by_the_next_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines(10))
    server.refused = {"3", "7"}
    done = run(server, "in.jsonl", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "2 requests failed" in done.stderr
    failed = results((tmp_path / "out.jsonl").read_text())
    assert [said for _, said in failed if not said.startswith("answer")] == ["bad", "bad"]
    server.refused, server.asked = set(), []
    assert run(server, "in.jsonl", "out.jsonl", cwd=tmp_path).returncode == 0
    assert sorted(server.asked) == ["3", "7"]
    assert results((tmp_path / "out.jsonl").read_text()) == ANSWERS[:10]


def test_a_line_that_has_changed_is_asked_again(server: Server, tmp_path: Path) -> None:
    def write(*questions: int) -> None:
        text = "".join(json.dumps({"question": str(each)}) + "\n" for each in questions)
        (tmp_path / "in.jsonl").write_text(text)

    write(1, 2, 3)
    assert run(server, "in.jsonl", "out.jsonl", cwd=tmp_path).returncode == 0
    server.asked.clear()
    write(1, 9, 2, 3)  # the others are lines with other numbers now
    done = run(server, "in.jsonl", "out.jsonl", cwd=tmp_path)
    assert (done.returncode, "because the line has changed: 2" in done.stderr) == (0, True)
    assert sorted(server.asked) == ["2", "3", "9"]
    assert results((tmp_path / "out.jsonl").read_text()) == [
        (str(number), f"answer {said}") for number, said in enumerate((1, 9, 2, 3), 1)
    ]
    server.asked.clear()
    assert run(server, "in.jsonl", "out.jsonl", cwd=tmp_path).stderr == ""
    assert server.asked == []


def test_a_request_at_which_the_connection_is_closed_fails_alone(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(lines(20))
    server.cut_off = {"3"}
    words = ("in.jsonl", "out.jsonl", "--url", server.url)
    done = subprocess.run(
        [sys.executable, "-c", NO_WAITING, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "1 requests failed" in done.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in found] == [f"r{n}" for n in range(20)]
    failed = [line for line in found if line["error"] is not None]
    assert [(line["custom_id"], line["error"]["code"]) for line in failed] == [
        ("r3", "ConnectionLost")
    ]
    server.cut_off = set()
    assert run(server, "in.jsonl", "out.jsonl", cwd=tmp_path).returncode == 0
    assert results((tmp_path / "out.jsonl").read_text()) == ANSWERS[:20]


def test_two_commands_do_not_write_the_same_output(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines(2))
    words = ("in.jsonl", "out.jsonl")
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    with lock.locked(tmp_path / "out.jsonl"):
        for output in ("out.jsonl", "link.jsonl"):
            done = run(server, "in.jsonl", output, cwd=tmp_path)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert "another process writes its results" in done.stderr
    assert server.asked == []
    (tmp_path / "out.jsonl.lock").touch()  # of a process that was killed
    assert run(server, *words, cwd=tmp_path).returncode == 0
    assert results((tmp_path / "out.jsonl").read_text()) == ANSWERS[:2]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "link.jsonl", "out.jsonl"]


def test_a_batch_stops_if_the_server_cannot_be_reached(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines(3))
    words = ("in.jsonl", "out.jsonl", "--url", "http://127.0.0.1:1/v1", "-m", "m")
    done = subprocess.run(
        [sys.executable, "-c", NO_WAITING, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "the server cannot be reached" in done.stderr
    assert "(at http://127.0.0.1:1/v1; --url names another one)" in done.stderr
    assert done.stderr.count("\n") == 1  # the others fail without a word
    assert run(server, "in.jsonl", "out.jsonl", cwd=tmp_path).returncode == 0
    assert results((tmp_path / "out.jsonl").read_text()) == ANSWERS[:3]


NO_WAITING = """
import sys
from saccade_client import cli
sys.modules["saccade_client.cli.batch"]._RETRIES = 0
sys.argv[1:1] = ["batch"]
cli.main()
"""


def test_lines_of_the_batch_api_and_files(server: Server, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "in.jsonl").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",'
        ' "body": {"model": "x", "max_tokens": 3, "messages": [{"role": "user", "content": "1"}]}}'
        '\n\n{"question": "2", "files": ["red.png"], "system": "s"}\n'
        '{"question": "3", "files": ["none.png"]}\n'
    )
    done = run(server, str(tmp_path / "in.jsonl"), "-")
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["custom_id"] for line in found] == ["a", "3", "4"]
    assert [line["error"] and line["error"]["code"] for line in found] == [
        *(None, None),
        "UnusableMedia",
    ]
    first, second = sorted(server.bodies, key=lambda body: body["model"], reverse=True)
    assert (first["model"], first["max_tokens"]) == ("x", 3)
    system, user = second["messages"]
    assert system == {"role": "system", "content": "s"}
    assert user["content"][0]["image_url"]["url"] == pictures.data_url(RED)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "line 1"),
        ("[]", "not a JSON object"),
        ("{}", "neither `body` nor `question`"),
        ('{"body": {}}', "no messages"),
        ('{"body": {"messages": [1]}}', "no messages"),
        ('{"body": {"messages": [], "conversation": 1}}', "`conversation` is no option"),
        ('{"question": "1", "messages": []}', "`messages` is no option"),
        ('{"body": {"messages": []}, "url": "/v1/embeddings"}', "/v1/embeddings"),
        ('{"question": "1", "files": "a.png"}', "`files` must be a list"),
        ('{"custom_id": "1", "question": "1"}\n{"custom_id": "1", "question": "2"}', "twice"),
    ],
)
def test_wrong_lines_are_named(line: str, message: str) -> None:
    with pytest.raises(batch.InvalidLine, match=message):
        list(batch.read(line.splitlines()))


def test_a_wrong_line_or_file_ends_the_command(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    done = run(server, "in.jsonl", "out.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 1: neither" in done.stderr
    done = run(server, "in.jsonl", "none/out.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "saccade: none is not a folder\n")
    done = run(server, "none.jsonl", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "No such file" in done.stderr
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    done = run(server, "latin.jsonl", "out.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not UTF-8" in done.stderr


def test_a_file_that_is_no_output_is_kept(tmp_path: Path) -> None:
    result = json.dumps(batch.Result("1", error=SaccadeError("no")).line())
    for text in ("my notes\n", "my notes", '{"a": 1}', f"{result}\nmy notes\n"):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(batch.InvalidLine, match="no output of a batch"):
            batch.Journal(tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == text
        assert os.listdir(tmp_path) == ["notes.txt"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(batch.InvalidLine, match="not a file"):
        batch.Journal(tmp_path / "pipe")


def test_a_line_that_was_cut_off_is_gone_after_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text('{"id": "1", "cus')
    for _ in range(3):  # starts that are interrupted
        batch.Journal(tmp_path / "out").close()
    journal = batch.Journal(tmp_path / "out")
    journal.add(batch.Result("1", error=SaccadeError("no")))
    journal.finish(["1"])
    journal.close()
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(line)["custom_id"] == "1"

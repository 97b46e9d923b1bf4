"""Every client example, and those in the README, run against the real server."""

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.server import test_example_sdks as sdks

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
STREAM = ["sh", str(EXAMPLES / "curl_stream.sh")]
EXPECTED = {
    "one_picture.py": "a red circle\n",
    "two_pictures.py": "a blue square\n",
    "streaming.py": "a blue square\n101 + 4 tokens\n",
    "structured_output.py": "red\n",
    "plain_httpx.py": "a red circle\n",
    "upload_once.py": "a blue square\nblue\n",
    "batch.py": "blue_square.png: a blue square\nred_circle.png: a red circle\n",
    "boxes.py": "320x240 shown as 320x256\nthe middle half is at (80.0, 60.0, 240.0, 180.0)\n",
}


def run(command: list[str], server: Server, cwd: Path) -> str:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXPECTED)
def test_a_python_example_prints_the_expected_text(
    name: str, server: Server, tmp_path: Path
) -> None:
    assert run([sys.executable, str(EXAMPLES / name)], server, tmp_path) == EXPECTED[name]


def test_every_python_example_is_tested() -> None:
    tested = {*EXPECTED, *sdks.EXPECTED, *sdks.THROUGH_PROXY, "gradio_app.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_the_readme_of_the_examples_lists_them() -> None:
    rows = re.findall(r"^\| `([\w.]+)` ", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert len(set(rows)) == len(rows)
    assert {path.name for path in EXAMPLES.glob("*.py")} | {"litellm_proxy.yaml"} <= set(rows)
    assert [name for name in rows if not (EXAMPLES / name).exists()] == []


def test_the_curl_example_gets_the_right_answer(server: Server, tmp_path: Path) -> None:
    assert '"content":"a red circle"' in run(["sh", str(EXAMPLES / "curl.sh")], server, tmp_path)


def test_the_streaming_curl_example_prints_the_answer(server: Server, tmp_path: Path) -> None:
    assert run(STREAM, server, tmp_path) == "a red circle\n"


def test_the_streaming_curl_example_prints_text_when_it_comes() -> None:
    """And says so if the answer is cut off."""
    is_seen, in_time = threading.Event(), list[bool]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for text in (r"a\n", "circle"):
                delta = f'{{"delta":{{"content":"{text}"}},"finish_reason":null}}'
                self.wfile.write(f'data: {{"choices":[{delta}]}}\n\n'.encode())
                in_time.append(is_seen.wait(60))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as slow:
        threading.Thread(target=slow.serve_forever, daemon=True).start()
        env = {**os.environ, "OPENAI_BASE_URL": f"http://127.0.0.1:{slow.server_address[1]}"}
        with subprocess.Popen(STREAM, env=env, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            first = running.stdout.readline()
            is_seen.set()
            rest = running.stdout.read()
        slow.shutdown()
    assert (first, rest, in_time) == (b"a\n", b"circle\n", [True, True])
    assert running.returncode == 1


def test_the_streaming_curl_example_shows_refusals(server: Server) -> None:
    env = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v0"}
    done = subprocess.run(STREAM, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (1, "")
    assert '"code": "not_found"' in done.stderr


def test_readme_curl_commands_work_when_pasted(server: Server, repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    asked, costs = re.findall(r"```sh\n(curl .*?)```", readme, re.DOTALL)
    expected = {asked: '"content":"a red circle"', costs: '"image_tokens":'}
    for block, answer in expected.items():
        assert "http://127.0.0.1:8000" in block
        command = block.replace("http://127.0.0.1:8000", server.url)
        assert answer in run(["bash", "-c", command], server, repository)

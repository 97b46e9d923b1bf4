"""Every client example, and those in the README, run against the real server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.server import test_example_sdks as sdks

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
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


def test_readme_curl_commands_work_when_pasted(server: Server, repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    asked, costs = re.findall(r"```sh\n(curl .*?)```", readme, re.DOTALL)
    expected = {asked: '"content":"a red circle"', costs: '"image_tokens":'}
    for block, answer in expected.items():
        assert "http://127.0.0.1:8000" in block
        command = block.replace("http://127.0.0.1:8000", server.url)
        assert answer in run(["bash", "-c", command], server, repository)

"""The client examples that need other SDKs, run against the real server.

The SDKs are in an environment of their own, `.venv/examples`. They may send nothing to other hosts:
a proxy for all of them sees it.
"""

import os
import secrets
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server
from tests.proxies import free_port
from tests.services import running

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
BLUE = str(EXAMPLES / "blue_square.png")
SDKS = Path(sys.prefix) / "examples" / "bin"
EXPECTED = {
    "with_anthropic.py": "a blue square\n",
    "with_dspy.py": "blue\n",
    "with_instructor.py": "blue\n",
    "with_langchain.py": "a blue square\n",
    "with_litellm.py": "a blue square\n",
    "with_llama_index.py": "a blue square\n",
    "with_pydantic_ai.py": "blue\n",
}
# Examples for the openai package that are run through LiteLLM's proxy.
THROUGH_PROXY = {
    "one_picture.py": ["a red circle"],
    "streaming.py": ["a blue square", "101 + 4 tokens"],
    "structured_output.py": ["red"],
    "batch.py": ["blue_square.png: a blue square", "red_circle.png: a red circle"],
    "upload_once.py": ["a blue square", "blue"],
}
# Asks the page of gradio_app.py, as its JavaScript would, and prints all it shows as the answer.
ASK_GRADIO = """
import sys
from gradio_client import Client, handle_file
url, picture, question = sys.argv[1:]
job = Client(url, verbose=False).submit(handle_file(picture), question, api_name="/ask")
job.result(timeout=120)
print(*job.outputs(), sep="\\n")
"""


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if not (SDKS.parent / ".installed").exists():
        pytest.fail("the SDKs of the examples are not installed: run `make examples`")


@pytest.fixture(scope="module")
def outside() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a proxy for other hosts, and the first lines it got. It answers nothing."""
    asked: list[bytes] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked.append(self.rfile.readline())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}", asked
        proxy.shutdown()


@pytest.fixture(scope="module")
def environment(
    server: Server,
    outside: tuple[str, list[bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, str]]:
    """The variables of the examples. Fails at the end if one has asked for another host."""
    folder = str(tmp_path_factory.mktemp("home"))
    proxy, asked = outside
    yield os.environ | {
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "ANTHROPIC_BASE_URL": server.url,
        "DSPY_CACHEDIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": folder,
        "HOME": folder,
        "LANGSMITH_TRACING": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
    }
    assert asked == []


def run(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXPECTED)
def test_an_sdk_answers_about_a_picture(name: str, environment: Mapping[str, str]) -> None:
    answer = run([str(SDKS / "python"), str(EXAMPLES / name), BLUE], environment)
    assert answer == EXPECTED[name]


# ---------------------------------------------------------------------- LiteLLM's proxy


@pytest.fixture(scope="module")
def litellm(environment: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """The variables of examples that use LiteLLM's proxy in the place of the server."""
    url, key = f"http://127.0.0.1:{free_port()}", f"sk-{secrets.token_hex(32)}"
    command = ("--config", str(EXAMPLES / "litellm_proxy.yaml"), "--host", "127.0.0.1")
    with running(
        [SDKS / "litellm", *command, "--port", url.rpartition(":")[2]],
        env={**environment, "OPENAI_API_KEY": "none", "LITELLM_MASTER_KEY": key},
        ready=lambda: httpx.get(f"{url}/health/readiness").status_code == 200,
    ):
        yield {**environment, "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key}


@pytest.mark.parametrize("name", THROUGH_PROXY)
def test_an_example_works_through_litellms_proxy(name: str, litellm: Mapping[str, str]) -> None:
    answer = run([sys.executable, str(EXAMPLES / name)], litellm)
    assert sorted(answer.splitlines()) == sorted(THROUGH_PROXY[name])


def test_litellms_proxy_lists_what_the_server_has(
    litellm: Mapping[str, str], http: httpx.Client
) -> None:
    form = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}
    made = http.post("/v1/files", **form).json()  # type: ignore[arg-type]
    headers = {"Authorization": f"Bearer {litellm['OPENAI_API_KEY']}"}
    with httpx.Client(base_url=litellm["OPENAI_BASE_URL"], headers=headers, timeout=60) as proxy:
        assert [model["id"] for model in proxy.get("/models").json()["data"]] == ["saccade-tiny"]
        assert made["id"] in {file["id"] for file in proxy.get("/files").json()["data"]}
        assert proxy.get("/batches").json()["object"] == "list"
    http.delete(f"/v1/files/{made['id']}")


# ---------------------------------------------------------------------- Gradio


def test_the_page_of_gradio_answers(environment: Mapping[str, str]) -> None:
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    with running(
        [SDKS / "python", EXAMPLES / "gradio_app.py"],
        env={**environment, "GRADIO_SERVER_PORT": port},
        ready=lambda: httpx.get(url).status_code == 200,
    ):
        command = [str(SDKS / "python"), "-c", ASK_GRADIO, url, BLUE, "What is in the image?"]
        shown = run(command, environment).splitlines()
    assert shown[-1] == "a blue square"
    assert all("a blue square".startswith(text) for text in shown)

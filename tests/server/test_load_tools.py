"""The load test of docs/load-testing.md with vLLM's own tool, run against the real server."""

import re
import shlex

from tests.conftest import Server
from tests.server.test_docs import ADDRESS, DOCS, blocks
from tests.starts import template

TOOL = ["vllm", "bench", "serve"]


def test_vllm_bench_measures_the_server(server: Server) -> None:
    (shown,) = [block for block in blocks(DOCS / "load-testing.md") if block.mark == "run"]
    words = shlex.split(shown.text.replace("\\\n", "").replace(ADDRESS, server.url))
    assert words[: len(TOOL)] == TOOL
    done = template().run("benchmarks.vllm_bench:main", *words[len(TOOL) :])
    assert done.returncode == 0, done.stderr
    results = dict(re.findall(r"^(.+?):\s+([\d.]+)\s*$", done.stdout, re.MULTILINE))
    assert (results["Successful requests"], results["Failed requests"]) == ("20", "0")
    assert results["Total generated tokens"] == str(20 * 16)
    image_tokens = 300  # of a picture of 640x480, as of each that is larger
    assert float(results["Total input tokens"]) > 20 * (64 + image_tokens)
    assert float(results["Mean TTFT (ms)"]) > 0

"""A CUDA torchvision can be imported with a CPU torch; a working torchvision is left unchanged."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from server.engine.vllm_adapter import plugin

# Runs each line of standard input, JSON of Python code, in a fork, and answers with its output.
FORKS = """
import json, os, sys, torch
for line in sys.stdin:
    output, into = os.pipe()
    if not os.fork():
        os.dup2(into, 1)
        os.dup2(into, 2)
        exec(json.loads(line))
        sys.stdout.flush()
        os._exit(0)
    os.close(into)
    with open(output) as file:
        print(json.dumps(file.read()), flush=True)
    os.wait()
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs code in a process that has imported torch, and returns what the process writes."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def run_it(code: str, *paths: Path) -> str:
            prologue = "".join(f"sys.path.insert(0, {str(path)!r})\n" for path in paths)
            print(json.dumps(f"import sys\n{prologue}{code}"), file=requests, flush=True)
            return str(json.loads(answers.readline()))

        yield run_it


def test_a_cuda_torchvision_can_be_imported_with_a_cpu_torch(run: Run) -> None:
    written = run(
        "from server.engine.vllm_adapter.plugin import make_torchvision_importable\n"
        "make_torchvision_importable(); make_torchvision_importable()\n"
        "import torch, torchvision.transforms.v2.functional as F\n"
        "print(F.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [4, 4]).shape)"
    )
    assert "torch.Size([3, 4, 4])" in written


@pytest.fixture
def healthy_torchvision(tmp_path: Path) -> Path:
    """A torchvision whose C extension loads and whose import declares its own operator, as in a
    CPU build: a second declaration would make that fail."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "lib = torch.library.Library('torchvision', 'DEF')\n"
        "lib.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    source = tmp_path / "empty.c"
    source.write_text("int nothing;\n")
    subprocess.run(["cc", "-shared", "-o", package / "_C.so", source], check=True)
    return tmp_path


def test_a_working_torchvision_is_left_unchanged(run: Run, healthy_torchvision: Path) -> None:
    written = run(
        "from server.engine.vllm_adapter import plugin\n"
        "plugin.make_torchvision_importable()\n"
        "assert plugin._library is None\n"
        "import torchvision, torch; torch.ops.torchvision.nms; print('fine')",
        healthy_torchvision,
    )
    assert written == "fine\n"


def test_a_torchvision_already_imported_is_left_unchanged(
    run: Run, healthy_torchvision: Path
) -> None:
    written = run(
        "import torchvision\n"
        "from server.engine.vllm_adapter import plugin\n"
        "plugin.make_torchvision_importable()\n"
        "assert plugin._library is None; print('fine')",
        healthy_torchvision,
    )
    assert written == "fine\n"


def test_vllm_finds_the_plugin() -> None:
    (found,) = entry_points(group="vllm.platform_plugins", name="saccade")
    assert found.load() is plugin.register_platform

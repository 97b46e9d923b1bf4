"""A CUDA torchvision can be imported with a CPU torch; a working torchvision is left unchanged."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from server.engine.vllm_adapter import plugin


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    prologue = "".join(f"import sys; sys.path.insert(0, {str(path)!r})\n" for path in paths)
    return subprocess.run(
        [sys.executable, "-c", prologue + code], capture_output=True, text=True, check=False
    )


def test_a_cuda_torchvision_can_be_imported_with_a_cpu_torch() -> None:
    done = run(
        "from server.engine.vllm_adapter.plugin import make_torchvision_importable\n"
        "make_torchvision_importable(); make_torchvision_importable()\n"
        "import torch, torchvision.transforms.v2.functional as F\n"
        "print(F.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [4, 4]).shape)"
    )
    assert "torch.Size([3, 4, 4])" in done.stdout, done.stderr


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


def test_a_working_torchvision_is_left_unchanged(healthy_torchvision: Path) -> None:
    done = run(
        "from server.engine.vllm_adapter import plugin\n"
        "plugin.make_torchvision_importable()\n"
        "assert plugin._library is None\n"
        "import torchvision, torch; torch.ops.torchvision.nms; print('fine')",
        healthy_torchvision,
    )
    assert done.stdout == "fine\n", done.stderr


def test_a_torchvision_already_imported_is_left_unchanged(healthy_torchvision: Path) -> None:
    done = run(
        "import torchvision\n"
        "from server.engine.vllm_adapter import plugin\n"
        "plugin.make_torchvision_importable()\n"
        "assert plugin._library is None; print('fine')",
        healthy_torchvision,
    )
    assert done.stdout == "fine\n", done.stderr


def test_vllm_finds_the_plugin() -> None:
    (found,) = entry_points(group="vllm.platform_plugins", name="saccade")
    assert found.load() is plugin.register_platform

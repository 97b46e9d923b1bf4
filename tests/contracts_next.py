"""Report broken vLLM contracts of the newest release: `python -m tests.contracts_next [VERSION]`.

Downloads vLLM's wheel, reads only its Python files, and ends with status 0 whatever it finds:
the server uses the version pinned in `pyproject.toml`.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.vllm_contracts import CONTRACTS, Source


def download(version: str | None, directory: Path) -> Path:
    """The wheel of vLLM `version`, or of the newest one."""
    wanted = f"vllm=={version}" if version else "vllm"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "-d", directory, wanted], check=True)
    return next(directory.glob("vllm-*.whl"))


def unpack(wheel: Path, directory: Path) -> Path:
    """The Python files of `wheel`; returns the folder `vllm`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [n for n in archive.namelist() if n.endswith(".py")])
    return directory / "vllm"


def report(source: Source) -> list[str]:
    """A sentence for each broken contract and each failing import."""
    broken = [sentence for each in CONTRACTS if (sentence := source.broken(each))]
    return [*broken, *source.missing_imports()]


def main(version: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="vllm-next-") as name:
        directory = Path(name)
        wheel = download(version, directory)
        found = report(Source(unpack(wheel, directory)))
    print(f"vLLM {wheel.name.split('-')[1]}: {len(CONTRACTS)} contracts, {len(found)} problems")
    for sentence in found:
        print(f"- {sentence}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)

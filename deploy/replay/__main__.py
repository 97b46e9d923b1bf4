"""Builds and tests a target of the Dockerfile without Docker; `make image-check` does.

    python -m deploy.replay FOLDER [--target cpu] [--bind PATH ...]       (as root, on Debian)

Debian's own packages (debootstrap) stand in for the image of Python. Each stage that the target
needs becomes a folder below FOLDER, where the instructions are done in a chroot. The target is
then started as a container is: as process 1 and as a user that has no name, on a read-only root,
without a network or any capability, with its volumes, /tmp and as much /dev/shm as in the Compose
file. It must answer a picture, pass its HEALTHCHECK, and end with status 0 at its STOPSIGNAL.

--bind shows a file or folder of this machine to the build, where packages come from there.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml
from docker.utils import parse_bytes

from deploy.replay.build import REPOSITORY, Builder
from deploy.replay.container import check


def shm_bytes(target: str) -> int:
    """The Compose file's settings for the server of that name."""
    services = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())["services"]
    return int(parse_bytes(services[f"server-{target}"]["shm_size"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the roots: some GB; kept and used again")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--bind", type=Path, action="append", default=[], metavar="PATH")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("chroot and mount need root")
    args.folder.mkdir(parents=True, exist_ok=True)
    builder = Builder(args.folder.resolve(), [path.absolute() for path in args.bind])
    builder.prepare()
    check(builder.build(args.target), shm_bytes(args.target))


if __name__ == "__main__":
    main()

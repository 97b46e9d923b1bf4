"""Builds the stages of the Dockerfile as folders, running their instructions in a chroot."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from string import Template

from docker.utils import exclude_paths
from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).resolve().parents[2]
# Separate mounts and processes, all of which end with `unshare`.
ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
PACKAGES = "python3,python3-venv"


@dataclass
class Stage:
    """One FROM and the instructions after it. `base` is an image or the name of another stage."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Image:
    """The root folder of a stage, and the configuration of its containers."""

    root: Path
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root"}
    )
    folder: str = "/"
    volumes: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    entry_point: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"


def stages(dockerfile: Path) -> dict[str, Stage]:
    """The stages by their names, with the arguments above the first FROM filled in."""
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for step in DockerfileParser(fileobj=BytesIO(dockerfile.read_bytes())).structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "FROM":
            base, _, name = Template(value).substitute(arguments).partition(" AS ")
            found[name] = Stage(name, base)
        elif instruction == "ARG" and not found:
            name, _, default = value.partition("=")
            arguments[name] = default
        elif instruction != "COMMENT":
            list(found.values())[-1].instructions.append((instruction, value))
    return found


class Builder:
    """Builds stages below `folder`. `binds` are paths of this machine that the build sees."""

    def __init__(self, folder: Path, binds: list[Path]) -> None:
        self._folder = folder
        self._binds = binds
        self._stages = stages(REPOSITORY / "Dockerfile")
        self._context = folder / "context"

    def prepare(self) -> None:
        """Make the base and the build context."""
        base = self._folder / "base"
        if not base.exists():
            unfinished = self._folder / "base.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", unfinished)
            unfinished.rename(base)
        shutil.rmtree(self._context, ignore_errors=True)
        ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
        patterns = [line for line in ignored if line and not line.startswith("#")]
        for path in exclude_paths(str(REPOSITORY), patterns):
            if (source := REPOSITORY / path).is_file():
                (self._context / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, self._context / path)

    def build(self, name: str) -> Image:
        """The stage `name`, built from nothing together with the stages it needs."""
        stage = self._stages[name]
        if not re.match(r"python:.*-bookworm$", stage.base):
            raise SystemExit(f"{name}: there is nothing here to stand in for {stage.base}")
        image = Image(self._folder / name)
        run("rm", "-rf", "--one-file-system", image.root)
        run("cp", "-a", "--reflink=auto", self._folder / "base", image.root)
        for instruction, value in stage.instructions:
            print(f"[{name}] {instruction} {value}", flush=True)
            self._do(image, instruction, value)
        return image

    def _do(self, image: Image, instruction: str, value: str) -> None:
        if instruction in ("ENV", "ARG"):
            known = image.arguments | image.environment
            words = shlex.split(Template(value).safe_substitute(known))
            table = image.environment if instruction == "ENV" else image.arguments
            for word in words:
                name, _, text = word.partition("=")
                table[name] = text
        elif instruction == "WORKDIR":
            image.folder = value
            within(image.root, value).mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            self._copy(image, value)
        elif instruction == "RUN":
            self._run(image, value)
        elif instruction == "VOLUME":
            image.volumes.append(value)
        elif instruction == "STOPSIGNAL":
            image.stop_signal = value
        elif instruction == "HEALTHCHECK":
            image.health = json.loads(value.partition("CMD ")[2])
        elif instruction == "ENTRYPOINT":
            image.entry_point = json.loads(value)
        elif instruction not in ("EXPOSE", "LABEL", "USER"):  # tested as any user
            raise SystemExit(f"cannot replay {instruction}")

    def _copy(self, image: Image, value: str) -> None:
        *sources, target = value.split()
        origin = self._context
        if sources[0].startswith("--from="):
            origin = self.build(sources.pop(0).removeprefix("--from=")).root
        goal = within(image.root, str(Path(image.folder, target)))
        for source in sources:
            path = within(origin, source)
            is_folder = path.is_dir() or len(sources) > 1 or target.endswith("/")
            (goal if is_folder else goal.parent).mkdir(parents=True, exist_ok=True)
            run("cp", "-a", f"{path}/." if path.is_dir() else path, goal)

    def _run(self, image: Image, value: str) -> None:
        words = value.split()
        mounts = [(bind, str(bind)) for bind in self._binds]
        while words[0].startswith("--mount="):
            mount = dict(part.split("=", 1) for part in words.pop(0)[8:].split(","))
            if mount["type"] == "bind":
                source = self.build(mount["from"]).root
                mounts.append((within(source, mount["source"]), mount["target"]))
            elif mount["type"] == "cache":
                cache = self._folder / "cache" / mount["target"].strip("/").replace("/", "-")
                cache.mkdir(parents=True, exist_ok=True)
                mounts.append((cache, mount["target"]))
            value = value.partition(" ")[2].lstrip()
        network = ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs"]
        mounts += [(Path(path), path) for path in network if Path(path).exists()]
        script = ["mount -t proc proc proc", "mount --rbind /dev dev"]
        for path, target in mounts:
            place = within(image.root, target)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            script.append(shlex.join(["mount", "--bind", str(path), str(place)]))
        given = {name: text for name, text in os.environ.items() if name.startswith("PIP_")}
        variables = given | image.arguments | image.environment
        command = f"cd {shlex.quote(image.folder)} && {value}"
        in_root = ["chroot", ".", "env", "-i", *assigned(variables), "sh", "-c", command]
        script.append("exec " + shlex.join(in_root))
        run(*ISOLATED, "sh", "-ec", "\n".join(script), cwd=image.root)


def within(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def assigned(variables: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


def run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)

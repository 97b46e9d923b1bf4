"""The documentation builds without warnings, loads nothing from other hosts, and shows commands
that work."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer

from saccade_client import cli
from server.planner.flags import add_flags
from tests.conftest import Server

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADDRESS = "http://127.0.0.1:8000"
# Flags of other programs that pages mention without their command.
FOREIGN_FLAGS = {
    "--ask",
    "--baseline",
    "--cap-drop",
    "--dataset-name",
    "--device",
    "--ec-connector",
    "--faults",
    "--fuzz-examples",
    "--goodput",
    "--health-cmd",
    "--input-file",
    "--observed",
    "--profile",
    "--read-only",
    "--set",
    "--stub-encoder",
    "--stub-engine",
    "--tmpfs",
    "--use-server-token-count",
    "--user",
}

_FENCE = re.compile(r"(?:<!-- (\w+) -->\n)?```(\w*)\n(.*?)```\n", re.DOTALL)
_INLINE_FLAGS = re.compile(r"`(--[a-z][^`]*)`")
_PATHS = re.compile(r"(?<![\w/.-])((?:benchmarks|clients|deploy|docs|tests)/[\w./-]+)")
_FLAG = re.compile(r"--[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its mark (what the tests do with it), its language and its text."""

    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups(default="")) for found in _FENCE.finditer(page.read_text())]


def exchanges() -> list[tuple[Block, Block | None]]:
    """Each runnable block of the quick start, with the answer shown after it, if any."""
    found = blocks(DOCS / "quickstart.md")
    followers = [*found[1:], None]
    return [
        (block, after if after is not None and after.mark == "answer" else None)
        for block, after in zip(found, followers, strict=True)
        if block.mark == "run"
    ]


# ---------------------------------------------------------------------- the quick start


def test_every_block_of_the_quick_start_is_checked() -> None:
    found = blocks(DOCS / "quickstart.md")
    assert {block.mark for block in found} == {"start", "run", "answer"}
    answers = [block for block in found if block.mark == "answer"]
    assert answers == [answer for _, answer in exchanges() if answer is not None]


@pytest.mark.parametrize(("asked", "answer"), exchanges())
def test_quick_start_commands_print_the_answers_shown(
    asked: Block, answer: Block | None, server: Server
) -> None:
    assert ADDRESS in asked.text
    text = asked.text.replace(ADDRESS, server.url)
    shell = ["bash", "-euo", "pipefail", "-c"]
    command = shell if asked.language == "sh" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, text], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    if answer is None:
        assert not done.stdout
    elif answer.language == "json":
        assert contains(json.loads(done.stdout), json.loads(answer.text)), done.stdout
    else:
        assert done.stdout.strip() == answer.text.strip()


def contains(whole: Any, part: Any) -> bool:
    """Whether `part` is `whole` with some fields of its objects left out."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            name in whole and contains(whole[name], value) for name, value in part.items()
        )
    if isinstance(part, list):
        return (
            isinstance(whole, list)
            and len(whole) == len(part)
            and all(contains(*pair) for pair in zip(whole, part, strict=True))
        )
    return bool(whole == part)


def test_contains_ignores_only_fields_missing_from_the_part() -> None:
    assert contains({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]})
    assert not contains({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}]})
    assert not contains({"a": 1}, {"a": 1, "b": 2})


# ---------------------------------------------------------------------- flags and paths


@pytest.fixture(scope="module")
def parser() -> Any:
    """The argument parser of `saccade serve`, without the checks after parsing."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from server import settings as config

    parser = FlexibleArgumentParser()
    make_arg_parser(parser)
    config.add_flags(parser)
    return parser


def test_quick_start_serve_commands_parse(parser: Any) -> None:
    starts = [block.text for block in blocks(DOCS / "quickstart.md") if block.mark == "start"]
    commands = []
    for start in starts:
        if start.startswith("make "):
            shown = subprocess.run(
                ["make", "--dry-run", *shlex.split(start)[1:]],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            (start,) = re.findall(r"bin/(saccade serve .*)", shown.stdout)
        commands.append(shlex.split(start)[2:])
    assert len(commands) == 3
    for command in commands:
        parser.parse_args(command)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_flags_named_on_a_page_exist(page: Path, parser: Any) -> None:
    known = set(parser._option_string_actions) | FOREIGN_FLAGS | client_flags() | plan_flags()
    text = page.read_text()
    named = {flag for span in _INLINE_FLAGS.findall(text) for flag in _FLAG.findall(span)}
    for command in commands_of(text):
        named |= {word.partition("=")[0] for word in command if word.startswith("--")}
    assert named - known == set()


def plan_flags() -> set[str]:
    """The flags of `saccade plan` that are not of `saccade serve`."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return set(parser._option_string_actions)


def client_flags() -> set[str]:
    """The flags of the client's commands."""
    app = typer.main.get_command(cli.app(""))
    assert isinstance(app, typer.core.TyperGroup)
    params = [param for command in (app, *app.commands.values()) for param in command.params]
    return {flag for param in params for flag in (*param.opts, *param.secondary_opts)}


def commands_of(text: str) -> list[list[str]]:
    """The words of each `saccade serve ...` in the fenced blocks of a page."""
    joined = text.replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)
        for _, language, body in _FENCE.findall(joined)
        if language == "sh"
        for line in body.splitlines()
        if "saccade serve" in line
    ]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_named_on_a_page_exist(page: Path) -> None:
    named = {path.rstrip("./") for path in _PATHS.findall(page.read_text())}
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_unsupported_flags_are_listed_and_refused() -> None:
    from server.engine import arguments

    listed = first_cells((DOCS / "migration.md").read_text(), "Refused flags")
    assert {*arguments._UNSUPPORTED.values()} <= listed
    values = {"--grpc-port": ["9000"]}
    for flag in listed:
        with pytest.raises(SystemExit) as refused:
            arguments.parse([flag, *values.get(flag, [])])
        assert refused.value.code == 2, flag


def test_cpu_defaults_are_listed() -> None:
    from server.engine import arguments

    page = (DOCS / "migration.md").read_text()
    other = {*arguments._CPU_DEFAULTS, "--max-model-len", "VLLM_CPU_KVCACHE_SPACE"}
    assert first_cells(page, "Other defaults on a CPU") == other
    for flag, (_, value) in arguments._CPU_DEFAULTS.items():
        shown = "on" if value is True else str(value)
        assert f"| `{flag}` | `{shown}` |" in page
    longest = arguments._CPU_MAX_MODEL_LEN
    assert f"| `--max-model-len` | the model's own, at most {longest} |" in page
    assert f"| `VLLM_CPU_KVCACHE_SPACE` | `{arguments._CPU_KV_CACHE_GIB}` |" in page


def test_vllm_plugins_are_listed() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    page = (DOCS / "migration.md").read_text()
    (listed,) = re.findall(
        r"If you set `VLLM_PLUGINS`, include Saccade's plugin in it: `(\w+)`", page
    )
    assert {listed} == {name for plugins in groups.values() for name in plugins}


@pytest.mark.parametrize(
    "page", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda page: page.name
)
def test_docker_commands_publish_ports_on_localhost_only(page: Path) -> None:
    runs = [line for line in page.read_text().splitlines() if line.startswith("docker run ")]
    ports = [words[at + 1] for words in map(str.split, runs) for at in indices(words, "-p")]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert ports or page.name != "deploy.md"


def indices(words: list[str], wanted: str) -> list[int]:
    return [at for at, word in enumerate(words) if word == wanted]


def first_cells(page: str, heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    _, _, section = page.partition(f"\n## {heading}\n")
    return set(re.findall(r"^\| `([^`]+)` \|", section.partition("\n## ")[0], re.MULTILINE))


# ---------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        path = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert (site / path).is_file()


class _Loads(HTMLParser):
    """Collects the URLs that a browser loads when it opens a page, and the page's CSS classes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.classes |= set((given.get("class") or "").split())
        names = ("href",) if tag == "link" else ("src", "srcset", "data", "poster", "action")
        self.found += [value for name in names if (value := given.get(name)) is not None]


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    foreign = re.compile(r"(?:https?:)?//")
    for page in site.rglob("*.html"):
        loads = _Loads()
        loads.feed(page.read_text())
        assert loads.found
        assert [url for url in loads.found if foreign.match(url)] == []
        # The theme's script would fetch a library for these classes.
        assert not loads.classes & {"mermaid", "arithmatex"}
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text())


def test_readme_links_point_to_existing_files() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\b(docs/\w+\.md)", text) + re.findall(r"\]\(([\w/.-]+)\)", text)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []

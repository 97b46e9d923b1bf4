"""The systemd unit: valid, confined, with a command line and signals that the server accepts."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from server.engine.arguments import parse
from server.settings import PREFIX, HttpSettings, leaves
from tests.services import program

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNIT = FOLDER / "saccade.service"
INSTALLED = "/opt/saccade/bin"
# In tenths, up to 100; a service without any confinement has 96.
MAX_EXPOSURE = 20


def settings(text: str) -> dict[str, list[str]]:
    """The values of each setting of a unit, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def environment(lines: list[str]) -> dict[str, str]:
    """The variables of `NAME=VALUE` lines, as systemd reads them; comments are skipped."""
    words = [word for line in lines if not line.startswith("#") for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def command(line: str, variables: dict[str, str]) -> list[str]:
    """The words of a command line: `${NAME}` stays one word, `$NAME` is split into words."""
    words: list[str] = []
    for word in line.split():
        if re.fullmatch(r"\$\w+", word):
            words += variables.get(word[1:], "").split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda name: variables[name[1]], word))
    return words


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with the path of the `saccade` under test."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(INSTALLED, str(Path(sys.executable).parent)))
    return path


def test_the_unit_is_valid(unit: Path) -> None:
    analyze = program("systemd-analyze")
    result = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_unit_is_confined(unit: Path) -> None:
    analyze = program("systemd-analyze")
    result = subprocess.run(
        [analyze, "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", unit],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-300:] + result.stderr


def test_the_stop_timeout_of_the_unit_covers_the_drain() -> None:
    stop_s = int(settings(UNIT.read_text())["TimeoutStopSec"][0])
    http = HttpSettings()
    assert stop_s > http.drain_delay_s + http.drain_timeout_s + 10


def test_the_unit_keeps_connections_alive_and_sends_no_usage_data() -> None:
    set_to = environment(settings(UNIT.read_text())["Environment"])
    assert int(set_to["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60
    assert set_to["VLLM_NO_USAGE_STATS"] == "1"


def test_variables_of_the_example_file_are_settings() -> None:
    text = (FOLDER / "saccade.env").read_text()
    named = set(re.findall(rf"^#?({PREFIX}\w+)=", text, re.MULTILINE))
    assert named
    assert named <= {PREFIX + name.upper() for _, name, _ in leaves()}


def test_the_server_accepts_the_units_command_line() -> None:
    """The server parses its flags, and the unit stops it with the signal that drains it."""
    values = settings(UNIT.read_text())
    example = (FOLDER / "saccade.env").read_text().splitlines()
    own = ["ARGS='--max-model-len 2048 --image-workers 1'", "PORT=8123"]
    variables = environment([*values["Environment"], *example, *own])
    assert variables["HOME"] == "/var/cache/saccade"
    executable, word, *flags = command(values["ExecStart"][-1], variables)
    assert (executable, word) == (f"{INSTALLED}/saccade", "serve")
    with mock.patch.dict(os.environ):  # parsing changes it
        args, parsed = parse(flags)
    assert (args.port, args.max_model_len, parsed.images.image_workers) == (8123, 2048, 1)
    assert values["Type"] == ["notify"]  # tests/server/test_lifecycle.py tests the signal
    assert values["KillSignal"] == ["SIGTERM"]

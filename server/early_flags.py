"""Numbers of processes on a command line, before vLLM's parser is there to be asked. A wrong one is
left to that."""

import re
from collections.abc import Sequence
from pathlib import Path

_CONFIG = "--config"


def number(words: Sequence[str], flag: str, short: str = "", default: str = "1") -> int:
    """The value of the last `flag` in `words`; 1 if it is no number. As for vLLM, a flag counts
    more than a file of flags, whose name is a word of its own; `default` counts less than both."""
    given = in_file = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in (flag, short):
            given = value if equals else following
        elif word == _CONFIG:
            in_file = _in_config(Path(following), flag)
    found = given or in_file or default
    return int(found) if found.isdecimal() else 1


def _in_config(path: Path, flag: str) -> str | None:
    """The value in a YAML file of flags."""
    name = flag.removeprefix("--").replace("-", "[-_]")
    try:
        found = re.findall(rf"^\s*[\"']?{name}[\"']?\s*:\s*(\S+)", path.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return found[-1].strip("\"'") if found else None

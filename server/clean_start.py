"""A start without secrets, so that processes for untrusted files can be forked from the server.

The process replaces itself (`execve`), which leaves nothing of its memory: the new program has only
the variables that imports need, and no flags. It imports, and makes the forks that must know no
secret. Only then does it read variables and flags from a file in memory, which the forks have
closed. It is still the same process for its parent, a terminal or systemd.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from server.workers import environment

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The last word only makes room: a process cannot have a longer title than its words and variables.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from server.cli import resume; resume({file}, {started!r})"
)
_ROOM_BYTES = 4096
# To inspect what is left at the end, and to skip the first line of a script.
_OF_THE_PROGRAM = {ord("i"): None, ord("x"): None}
_SECRET_FLAG = re.compile(
    r"--[a-z_-]*(?:key|keys|token|password|secret|headers?|url)(?:=|$)", re.IGNORECASE
)


def restart(command: str, words: Sequence[str], started: float) -> None:
    """Replace this process, which was asked for `command` with `words`, by one that calls
    `server.cli.resume`. Returns if that cannot be done, or would change what libraries do.

    Signals that stop the start are blocked until `begin`.
    """
    variables = environment.for_imports(os.environ)
    if variables is None or _is_watched() or not _is_for_cpu():
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with contextlib.suppress(OSError), os.fdopen(_memory_file(), "wb") as file:
        given = {
            "command": command,
            "words": list(words),
            "argv": sys.argv,
            "title": shlex.join(shown(sys.orig_argv)),
            "name": Path("/proc/self/comm").read_text().strip(),
            # Not those that imports have by now: they may change them.
            "withheld": {n: value for n, value in os.environ.items() if n not in variables},
        }
        file.write(json.dumps(given).encode("utf-8", "surrogateescape"))
        file.flush()
        program = _PROGRAM.format(path=sys.path, file=file.fileno(), started=started)
        options = interpreter_options(sys.orig_argv)
        arguments = [sys.executable, *options, "-c", program, " " * _ROOM_BYTES]
        os.execve(sys.executable, arguments, variables)  # noqa: S606 - no client chooses any of it
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def interpreter_options(command_line: Sequence[str]) -> list[str]:
    """The options of Python itself in a command line of Python, without those that only matter to
    the program that follows them there."""
    options: list[str] = []
    words = iter(command_line[1:])
    for word in words:
        if word == "-" or not word.startswith("-"):
            break
        if word.startswith("--"):  # --check-hash-based-pycs MODE
            options += [word, next(words, "")]
            continue
        flags = re.match(r"-[^cmWX]*", word)
        assert flags is not None
        plain = flags[0].translate(_OF_THE_PROGRAM)
        options += [plain] if len(plain) > 1 else []
        name, value = word[flags.end() :][:1], word[flags.end() + 1 :]
        if name in ("W", "X"):
            options += [f"-{name}", value or next(words, "")]
        elif name:  # the program
            break
    return options


def _memory_file() -> int:
    return os.memfd_create("saccade-start", 0)  # stays open in the next program


def _is_watched() -> bool:
    """Whether something else is in this process that the next program would lack, such as a
    debugger, a profiler or an agent for tracing."""
    is_traced = sys.gettrace() is not None or sys.getprofile() is not None
    return is_traced or threading.active_count() > 1


def _is_for_cpu() -> bool:
    """Whether this is vLLM for CPUs. What libraries for GPUs keep from their import has not been
    examined."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True  # its package for CPUs has another name


def shown(words: Sequence[str]) -> list[str]:
    """A command line without the values of secret flags."""
    shown = []
    is_secret = False
    for word in words:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            is_secret = _SECRET_FLAG.match(word) is not None
            shown.append(f"{name}=***" if is_secret and equals else word)
        else:
            shown.append("***" if is_secret else word)
    return shown


# ---------------------------------------------------------------------- in the new program


def begin() -> None:
    """Let the signals come again, and hide the program's text from lists of processes."""
    import setproctitle

    # Early, because the library finds the memory of the title by the variables of the start.
    setproctitle.setproctitle("saccade")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def take(file: int) -> tuple[str, list[str]]:
    """Take over the variables and the flags; returns the command and its words."""
    import setproctitle

    with os.fdopen(file, "rb") as given_file:
        given_file.seek(0)
        given: dict[str, Any] = json.loads(given_file.read().decode("utf-8", "surrogateescape"))
    setproctitle.setproctitle(given["title"])
    setproctitle.setthreadtitle(given["name"])
    os.environ.update(given["withheld"])
    sys.argv[:] = given["argv"]
    return given["command"], given["words"]

"""The command line: the server's commands, and the client's. Imports are light until a command
runs."""

import atexit
import contextlib
import importlib.util
import logging
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from server import __version__, clean_start, concurrency, front_ends, replica
from server.errors import CannotStart
from server.replica import Replica

log = logging.getLogger("saccade")

_STDOUT, _STDERR = 1, 2
_REPEAT_S = 0.2
# An interrupted start-up may take so long to end before a further signal interrupts that, too.
_PATIENCE_S = 30.0
_ZMQ_POLL = os.path.join("zmq", "sugar", "poll.py")

# The server's own commands, with their descriptions; the others are the client's.
_COMMANDS = {
    "serve": "Serve a model (default: the embedded demo model) over the OpenAI API.",
    "deploy": "Serve a model on Ray Serve, as replicas of front ends and engines (experimental).",
    "run-batch": "Answer the requests in a file, without a server.",
    "plan": "Tell what a model costs on a GPU: tokens, memory, times, cost of an image.",
    "demo": "Write sample pictures with questions, and ask a server about them.",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command; exit with status 2 on invalid usage."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-V", "--version"):
        print(f"saccade {__version__}")
    elif command == "serve":
        if rest in (["-h"], ["--help"]):
            _show_flags()
        else:
            _serve(command, rest, is_whole=argv is None)
    elif command == "run-batch":
        _serve(command, rest, is_whole=argv is None)
    elif command == "deploy":
        _serve(command, rest, is_whole=False)  # the processes of Ray open files
    elif command == "plan":
        _plan(rest)
    elif command == "demo":
        from server.demo.command import main as demo

        demo(rest)
    else:
        from saccade_client.cli import run

        run("saccade", __version__, _COMMANDS, arguments)


# ---------------------------------------------------------------------- saccade serve


class _Interrupted(KeyboardInterrupt):
    """Raised by a signal during the start-up.

    A subclass, because CPython remembers a plain KeyboardInterrupt that leaves `exec` of a string,
    which dataclasses use, and kills the process with SIGINT at exit even if it was caught.
    """


class Progress:
    """Reports each stage of the start-up as a line on standard error or in the log."""

    def __init__(self, started: float | None = None) -> None:
        self.started = time.monotonic() if started is None else started
        self.to_log = False

    def __call__(self, text: str) -> None:
        elapsed = time.monotonic() - self.started
        if (mine := Replica.current()) is not None:
            text = f"replica {mine.index}: {text}"
        if self.to_log:
            log.info(text, extra={"elapsed_s": round(elapsed, 1)})
        else:
            with contextlib.suppress(OSError):  # the disk with the log is full
                print(f"saccade [{elapsed:5.1f} s] {text}", file=sys.stderr, flush=True)


def _show_flags() -> None:
    """Print Saccade's flags. vLLM's would take seconds: its parser imports all of its options."""
    import argparse

    from server import settings

    parser = argparse.ArgumentParser(
        prog="saccade serve",
        usage="saccade serve [MODEL] [flags]",
        description="Serve MODEL (default: the embedded demo model) over the OpenAI API. Takes "
        "every flag of `vllm serve` besides its own.",
        epilog="vLLM's flags: --help=all lists them, --help=ModelConfig a section, "
        "--help=max-model-len one of them.",
    )
    settings.add_flags(parser)
    parser.print_help()


def _serve(command: str, argv: list[str], *, is_whole: bool) -> None:
    """Serve until a signal, or answer the requests in a file; exit with status 2 on invalid
    arguments. `is_whole`: this process does nothing else, and may become a new program."""
    _open_standard_files()
    progress = Progress()
    _interruptible()
    _end(_status(progress, lambda: _begin(command, argv, progress, is_whole=is_whole)))


def _begin(command: str, argv: list[str], progress: Progress, *, is_whole: bool) -> int:
    _quiet_libraries()
    os.environ.setdefault("OTEL_SERVICE_NAME", "saccade")
    # All metrics are in this process; this variable would make the library write them to files.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    is_help = _is_help(argv)
    if command == "serve" and not is_help and (count := replica.asked_for(argv)) > 1:
        return _serve_replicas(argv, count, progress, is_whole=is_whole)
    if not is_help and "json" not in (os.environ.get("SACCADE_LOG_FORMAT"), *map(_value, argv)):
        progress(f"Saccade {__version__}: loading vLLM")
    if is_whole and not is_help:
        clean_start.restart(command, argv, progress.started)
    return _run(argv, progress, command)


def resume(file: int, started: float) -> None:
    """Go on with `_serve` in the program of `clean_start`: `file` has what is secret."""
    progress = Progress(started)
    _interruptible()
    _end(_status(progress, lambda: _load_and_run(file, progress)))


def _load_and_run(file: int, progress: Progress) -> int:
    clean_start.begin()
    _load()
    from server.workers import template

    template.prepare(file)
    command, argv = clean_start.take(file)
    return _run(argv, progress, command)


def _serve_replicas(argv: list[str], count: int, progress: Progress, *, is_whole: bool) -> int:
    """Serve with several servers. This process only watches them."""
    import setproctitle

    from server.replicas.command import run

    if is_whole:  # hides secret flags
        setproctitle.setproctitle(shlex.join(clean_start.shown(sys.orig_argv)))

    def log_json() -> None:
        progress.to_log = True

    return run(argv, count, progress, log_json)


def _show_flags_of_plan() -> None:
    import argparse

    from server.planner.flags import add_flags

    parser = argparse.ArgumentParser(
        prog="saccade plan",
        usage="saccade plan [MODEL] --gpu NAME [flags]",
        description="Tell what MODEL (default: the embedded demo model) costs on a GPU, from its "
        "configuration alone. Takes every flag of `saccade serve` besides its own.",
    )
    add_flags(parser)
    parser.print_help()


def _plan(argv: list[str]) -> None:
    """Print a plan; exit with status 1 if there is none, and 2 on invalid arguments."""
    if argv in (["-h"], ["--help"]):
        _show_flags_of_plan()
        return
    _quiet_libraries()
    from server.errors import CannotPlan
    from server.plan import run

    status = 0
    try:
        run(argv)
    except (OSError, CannotPlan) as error:
        print(f"saccade plan: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    _end(status)


def _status(progress: Progress, work: Callable[[], int]) -> int:
    """The exit status of `work`."""
    try:
        return work()
    except KeyboardInterrupt:
        progress("stopped during start-up")
        return 130
    except (OSError, CannotStart) as error:  # the port is taken, a file is missing
        progress(f"cannot start: {error}")
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end(status: int) -> NoReturn:
    """End the process after the functions registered with `atexit`, without waiting for threads
    and without freeing objects.

    A signal may have hit the start of a thread in a pool, just before the pool noted it. Nothing
    tells such a thread to end, and the interpreter would wait for it for ever. vLLM has frozen its
    objects for the garbage collector, and libraries complain about those that live at the end.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk with the log is full
            stream.flush()
    os._exit(status)


def _open_standard_files() -> None:
    """Open those that are closed. Other files would get their descriptors, perhaps a client's
    connection, and with it what libraries print."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(_STDOUT, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(_STDERR, "w", closefd=False)  # noqa: SIM115


def _quiet_libraries() -> None:
    """Hide the start-up logs of libraries, unless the environment asks for them: `Progress` reports
    the stages."""
    # On a CPU, vLLM warns about every default that it changes, in each of its processes.
    level = "WARNING" if os.path.exists("/proc/driver/nvidia/version") else "ERROR"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if level == "ERROR":
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        warnings.simplefilter("ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _load() -> None:
    """Import what every process of the server needs, also for `fork_engine_core`."""
    from server.workers.process import import_uncollected

    import_uncollected()
    import server.engine.launch  # noqa: F401


def _is_help(argv: list[str]) -> bool:
    return any(word.startswith(("-h", "--help")) for word in argv)


def _run(argv: list[str], progress: Progress, command: str) -> int:
    is_help = _is_help(argv)
    from server.workers.process import import_uncollected, keep_imported

    import_uncollected()
    if command == "deploy":
        return _deploy(argv, progress)
    import uvloop

    from server.engine.arguments import parse
    from server.engine.vllm_adapter import plugin
    from server.scratch import Scratch

    # Before anything asks for the temporary folder.
    scratch = Scratch()
    plugin.ask(segments=scratch.id)
    if command == "serve" and not is_help and front_ends.asked_for(argv):
        return _supervise(argv, progress, scratch.path / "front-ends")
    _share_machine()
    if not is_help:
        from server.engine.launch import fork_engine_core

        fork_engine_core()
    args, settings = parse(argv, command)
    progress.to_log = settings.observability.log_format == "json"
    if args.api_server_count > 1:
        flag = f"{front_ends.FLAG} {args.api_server_count}"
        raise CannotStart(f"write the flag for several front ends as {flag}")
    if settings.replicas.replicas > 1:
        raise CannotStart(f"write the flag as {replica.FLAG} {settings.replicas.replicas}")
    if command == "run-batch":
        from server.run_batch import run
    else:
        from server.app import run

    keep_imported()
    return uvloop.run(run(args, settings, progress))


def _share_machine() -> None:
    """As one of several replicas, take a part of the machine by default."""
    mine = Replica.current()
    if mine is not None:
        concurrency.share_memory(mine.count)
        if not mine.has_cores:
            concurrency.share_cores(mine.count)


def _deploy(argv: list[str], progress: Progress) -> int:
    """Serve on Ray Serve. The processes of Ray do the work."""
    if importlib.util.find_spec("ray") is None:
        raise CannotStart("Ray is not installed: pip install 'saccade[ray]'")
    from server.scale.command import run
    from server.workers.process import keep_imported

    keep_imported()
    return run(argv, progress)


def _supervise(argv: list[str], progress: Progress, folder: Path) -> int:
    """Serve with several front ends. Each process parses the command line, as it would alone."""
    from server.supervisor import Supervisor
    from server.telemetry.log import use_json

    def run_engines(folder: Path, link: front_ends.Link) -> int:
        from server.engine.arguments import parse
        from server.engine.launch import fork_engine_core

        fork_engine_core()
        args, settings = parse(argv)
        progress.to_log = settings.observability.log_format == "json"
        from server.engine.host import run

        keep_imported()
        return run(args, settings, folder, link, progress)

    def run_front_end(mine: front_ends.FrontEnd) -> int:
        import uvloop

        from server.app import run
        from server.engine.arguments import parse

        args, settings = parse(argv)
        progress.to_log = settings.observability.log_format == "json"
        keep_imported()
        report = progress if mine.is_first else _say_nothing
        status = uvloop.run(run(args, settings, report, mine))
        return front_ends.ENGINES_LOST if status == 1 else status

    from server.workers.process import keep_imported

    if len(os.fsencode(folder)) > front_ends.MOST_PATH_BYTES:
        raise CannotStart(f"the name of {folder} is too long for sockets; set TMPDIR")
    folder.mkdir(mode=0o700)
    if _logs_json(argv):
        use_json()
        progress.to_log = True
    supervisor = Supervisor(
        lambda folder, link: _child_status(progress, lambda: run_engines(folder, link)),
        lambda mine: _child_status(progress, lambda: run_front_end(mine)),
        folder,
        progress,
    )
    return supervisor.run()


def _child_status(progress: Progress, work: Callable[[], int]) -> NoReturn:
    try:
        status = _status(progress, work)
    except SystemExit as end:  # invalid arguments
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    _end(status)


def _logs_json(argv: list[str]) -> bool:
    """Whether `--log-format json` is given, for a process that does not parse its flags."""
    given = os.environ.get("SACCADE_LOG_FORMAT")
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == "--log-format":
            given = value if equals else following
    return given == "json"


def _say_nothing(_: str) -> None:
    """Of several processes, one reports."""


def _value(word: str) -> str:
    """The value in a word of the command line: the part after `=`, or the word itself."""
    return word.rpartition("=")[2]


def _interruptible() -> None:
    """Make SIGTERM interrupt the start-up like Ctrl-C, until the server handles signals itself.

    The start-up mostly waits for the engine in pyzmq's `poll`, which may swallow the exception of a
    signal handler. So a timer repeats the interruption while the process is still in `poll`.
    """

    interrupted_at = -math.inf

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted_at
        now = time.monotonic()
        if number != signal.SIGALRM and now - interrupted_at < _PATIENCE_S:
            return  # a second exception would cut short what the first one has begun to end
        interrupted_at = now
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_S)
        raise _Interrupted

    def repeat(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.endswith(_ZMQ_POLL):
            interrupt(number, frame)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGALRM, repeat)

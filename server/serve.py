"""`saccade serve`: from arguments to a listening server, and orderly out again."""

import os
import signal
import sys
import time
from argparse import Namespace
from types import FrameType

from server import __version__
from server.config import Settings


class Progress:
    """One line on standard error for each stage of the start-up."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        print(f"saccade [{elapsed:5.1f} s] {text}", file=sys.stderr, flush=True)


def serve(argv: list[str]) -> None:
    """Serve until a signal; ends the process with status 2 on wrong arguments."""
    progress = Progress()
    _interruptible()
    # vLLM's own log is for those who ask for it; the stages are told below.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not {"-h", "--help"} & set(argv):
        progress(f"Saccade {__version__}: loading vLLM")
    from server.engine.arguments import parse

    args, settings = parse(argv)
    try:
        status = _run(args, settings, progress)
    except KeyboardInterrupt:
        progress("stopped during start-up")
        status = 130
    except OSError as error:  # the port is taken, a file is missing
        progress(f"cannot start: {error}")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(status)


def _run(args: Namespace, settings: Settings, progress: Progress) -> int:
    import uvloop

    from server.app import run

    return uvloop.run(run(args, settings, progress))


def _interruptible() -> None:
    """Until the server handles signals itself, SIGTERM interrupts the start like Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)

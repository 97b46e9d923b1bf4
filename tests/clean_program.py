"""What the tests of `server.clean_start` run in place of the server: it knows no secret of them."""

import json
import os
import signal
import sys

from server import clean_start
from server.workers import template
from server.workers.forkserver import Forkserver
from server.workers.worker import WorkerSpec


def start() -> None:
    """The first program, with the words of the command line."""
    clean_start._PROGRAM = (
        "import sys; sys.path[:] = {path!r}; "
        "from tests.clean_program import resume; resume({file}, {started!r})"
    )
    os.environ["SET_BEFORE"] = "1"
    clean_start.restart("serve", sys.argv[1:], 1.5)
    print("not restarted")


def resume(file: int, started: float) -> None:
    """The second program: starts a worker for each line of standard input, and tells on standard
    output what there is."""
    before = dict(os.environ)
    clean_start.begin()
    template.prepare(file)
    command, words = clean_start.take(file)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    told = [started, command, words, sys.argv, list(before), dict(os.environ), len(blocked)]
    told += [sys._xoptions, getattr(sys.stdout, "write_through", False)]
    print(json.dumps(told), flush=True)
    forkserver = Forkserver(WorkerSpec("tests.extractors:load", b"payload", 5.0, 1 << 30, "off"))
    for _ in sys.stdin:
        worker = forkserver.start()
        assert forkserver._process is not None
        print(json.dumps([forkserver._process.pid, worker.pid]), flush=True)
    forkserver.close()

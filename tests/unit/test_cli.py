"""The command line, as far as it needs no engine."""

import subprocess
import sys

# A stop that hits a start-up in the middle of starting a thread of a pool.
INTERRUPTED_START = """
import atexit
import threading

from server import cli

def run(argv, progress):
    atexit.register(print, "cleaned up")
    threading.Thread(target=threading.Event().wait).start()
    raise cli._Interrupted

cli._run = run
cli.main(["serve"])
"""


def test_an_interrupted_start_does_not_wait_for_threads() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_START], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 130
    assert ended.stdout == "cleaned up\n"
    assert "stopped during start-up" in ended.stderr

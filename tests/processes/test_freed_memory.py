"""Freed heap goes back to the system while a process works on."""

import subprocess
import sys

SCRIPT = """
import time
from server.workers import process

process._RETURN_INTERVAL_S = 0.1
process.return_regularly()
least = process.private_bytes()
for _ in range(2):  # also what is used again after it was returned
    chunks, pins = [], []
    for _ in range(2000):
        chunks.append(bytes(bytearray(64_000)))
        pins.append(bytearray(1000))  # what is freed before it is not at the end of the heap
    end = [bytes(bytearray(64_000)) for _ in range(4000)]
    assert process.private_bytes() > least + (300 << 20)
    time.sleep(0.5)  # looks while all of it is in use
    end.clear()  # glibc returns the end of the heap by itself
    chunks.clear()
    deadline = time.monotonic() + 30
    while process.private_bytes() > least + (20 << 20):
        assert time.monotonic() < deadline, process.private_bytes() - least
        time.sleep(0.05)
"""


def test_freed_heap_below_live_objects_is_returned() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)


IDLE = """
import time
from server.workers import process

process._RETURN_INTERVAL_S = 0.1
process.return_regularly()
chunks, pins = [], []
for _ in range(300):
    chunks.append(bytes(bytearray(64_000)))
    pins.append(bytearray(1000))
held = process.private_bytes()
chunks.clear()
deadline = time.monotonic() + 30
while process.private_bytes() > held - (15 << 20):
    assert time.monotonic() < deadline, held - process.private_bytes()
    time.sleep(0.05)
"""


def test_an_idle_process_returns_all_of_its_freed_heap() -> None:
    subprocess.run([sys.executable, "-c", IDLE], check=True, timeout=60)

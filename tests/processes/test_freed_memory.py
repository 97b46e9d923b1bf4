"""Freed heap goes back to the system while a process works on."""

import subprocess
import sys

SCRIPT = """
import time
from server.workers import memory

memory._RETURN_INTERVAL_S = 0.1
memory.return_regularly()
least = memory.private_bytes()
for _ in range(2):  # also what is used again after it was returned
    chunks, pins = [], []
    for _ in range(2000):
        chunks.append(bytes(bytearray(64_000)))
        pins.append(bytearray(1000))  # what is freed before it is not at the end of the heap
    end = [bytes(bytearray(64_000)) for _ in range(4000)]
    assert memory.private_bytes() > least + (300 << 20)
    time.sleep(0.5)  # looks while all of it is in use
    end.clear()  # glibc returns the end of the heap by itself
    chunks.clear()
    deadline = time.monotonic() + 30
    while memory.private_bytes() > least + (20 << 20):
        assert time.monotonic() < deadline, memory.private_bytes() - least
        time.sleep(0.05)
"""


def test_freed_heap_below_live_objects_is_returned() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)


IDLE = """
import time
from server.workers import memory

memory._RETURN_INTERVAL_S = 0.1
memory.return_regularly()
chunks, pins = [], []
for _ in range(300):
    chunks.append(bytes(bytearray(64_000)))
    pins.append(bytearray(1000))
held = memory.private_bytes()
time.sleep(0.5)  # looks while all of it is in use
chunks.clear()
deadline = time.monotonic() + 30
while memory.private_bytes() > held - (15 << 20):
    assert time.monotonic() < deadline, held - memory.private_bytes()
    time.sleep(0.5)  # reading the memory is work too, and a process that works is not idle
"""


def test_an_idle_process_returns_all_of_its_freed_heap() -> None:
    subprocess.run([sys.executable, "-c", IDLE], check=True, timeout=60)


PIECES = """
import random
import threading
from server.workers import memory

memory.keep_freed_memory_in_one_heap()
rng = random.Random(1)


def use(most: int, held: list) -> None:
    for number in range(400):
        held.append(bytes([number % 251]) * rng.randrange(1000, most))
        if len(held) > 40:
            del held[rng.randrange(len(held))]


least = memory.private_bytes()
held = [[] for _ in range(3)]
threads = [threading.Thread(target=use, args=(most, each)) for most, each in
           zip((5_000, 300_000, 5_000_000), held)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    memory.return_in_pieces()
for each in held:
    for data in each:
        assert data == data[:1] * len(data)
in_use = sum(len(data) for each in held for data in each)
freed = [bytes(bytearray(30_000_000)) for _ in range(20)]
pin = bytearray(100_000)
freed.clear()
assert memory.private_bytes() > in_use + 500_000_000
memory.return_in_pieces()
assert memory.private_bytes() < least + in_use + 20_000_000, memory.private_bytes() - in_use
for each in held:
    for data in each:
        assert data == data[:1] * len(data)
"""


def test_the_heap_is_returned_in_pieces_while_threads_use_it() -> None:
    subprocess.run([sys.executable, "-c", PIECES], check=True, timeout=120)


SCATTERED = """
from pathlib import Path
from server.workers import memory


def most_mapped() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak:"))


chunks = [bytearray(100_000) for _ in range(600)]
del chunks[::2]
before = most_mapped()
memory.return_in_pieces()
assert most_mapped() < before + (200 << 20), most_mapped() - before
"""


def test_no_piece_is_sought_again_and_again_in_scattered_free_memory() -> None:
    """glibc maps a piece beside the heap where nothing so large is free in it."""
    subprocess.run([sys.executable, "-c", SCATTERED], check=True, timeout=120)

"""How vLLM's processes wait for each other while images want the cores."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

from server.engine.vllm_adapter import cpu_waits, plugin


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_waits, "_last_work", None)
    monkeypatch.setattr(plugin, "ask", lambda image_work: cpu_waits.register(image_work))
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    cpu_waits.ask()


@pytest.fixture
def ends() -> Iterator[tuple[SpinCondition, SpinCondition]]:
    """The ends of a connection: the one that waits, and the one that wakes it."""
    with zmq.Context() as context:
        address = "inproc://cpu-waits"
        waker = SpinCondition(is_reader=False, context=context, notify_address=address)
        waiter: Any = SpinCondition(is_reader=True, context=context, notify_address=address)
        yield waiter, waker
        for end in (waiter, waker):
            for name in ("local_notify_socket", "write_cancel_socket", "read_cancel_socket"):
                if (socket := getattr(end, name)) is not None:
                    socket.close(0)


def turns(waiter: SpinCondition, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often it yields in a few waits."""
    yields = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: yields.append(1))
    waiter.record_read()
    for _ in range(3):
        waiter.wait()
    return len(yields)


def test_a_process_spins_unless_there_was_image_work(
    ends: tuple[SpinCondition, SpinCondition], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiter, _ = ends
    assert turns(waiter, monkeypatch) == 3
    cpu_waits.note_work()
    assert turns(waiter, monkeypatch) == 0  # and no wait is endless
    cpu_waits._last_work[0] = time.monotonic() - 2 * cpu_waits._RECENT_S
    assert turns(waiter, monkeypatch) == 3


def test_a_message_ends_the_wait(ends: tuple[SpinCondition, SpinCondition]) -> None:
    waiter, waker = ends
    cpu_waits.note_work()
    while not waiter.local_notify_socket.poll(100):
        waker.notify()  # the first are lost while the sockets connect
    waiter.wait()
    assert waiter.local_notify_socket.poll(0) == 0
    assert waiter.busy_loop_s == 1

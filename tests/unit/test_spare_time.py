"""Steps of a job that run in the time that no other process wants."""

import os
import threading
from types import SimpleNamespace

import pytest

from server.workers import spare_time
from server.workers.spare_time import SpareTime


class Clock:
    """The time, and what this process used of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.used = 100.0
        times = SimpleNamespace(monotonic=lambda: self.wall, process_time=lambda: self.used)
        monkeypatch.setattr(spare_time, "time", times)

    def pass_(self, wall: float, used: float) -> None:
        self.wall += wall
        self.used += used


def thread_and_class() -> tuple[int, int]:
    return threading.get_ident(), os.sched_getscheduler(0)


def test_steps_run_in_spare_time_while_the_job_gets_a_third_of_a_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    spare = SpareTime(allowed=True)
    own = thread_and_class()
    assert spare.run(thread_and_class) == own  # nothing is known of the machine yet
    clock.pass_(wall=1.0, used=0.5)
    thread, class_ = spare.run(thread_and_class)
    assert (thread == own[0], class_) == (False, os.SCHED_IDLE)
    clock.pass_(wall=1.0, used=0.0)
    assert spare.run(thread_and_class) == own
    clock.pass_(wall=1.0, used=1.0)
    assert spare.run(thread_and_class) == (thread, class_)
    assert thread_and_class() == own


def test_where_the_class_is_refused_steps_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    clock = Clock(monkeypatch)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    spare = SpareTime(allowed=True)
    clock.pass_(wall=1.0, used=1.0)
    thread, class_ = spare.run(thread_and_class)
    assert thread != threading.get_ident()
    assert class_ == os.sched_getscheduler(0)


def test_without_memory_for_a_thread_steps_run_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    clock = Clock(monkeypatch)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    spare = SpareTime(allowed=True)
    clock.pass_(wall=1.0, used=1.0)
    for _ in range(2):
        assert spare.run(threading.get_ident) == threading.get_ident()


def test_where_it_is_not_allowed_no_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    count = threading.active_count()
    spare = SpareTime(allowed=False)
    clock.pass_(wall=1.0, used=1.0)
    assert spare.run(threading.get_ident) == threading.get_ident()
    assert threading.active_count() == count


def test_a_step_gets_its_arguments_and_its_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    spare = SpareTime(allowed=True)
    for used in (0.0, 1.0):
        clock.pass_(wall=1.0, used=used)
        assert spare.run(int, "11", base=2) == 3
        with pytest.raises(ZeroDivisionError):
            spare.run(lambda: 1 // 0)

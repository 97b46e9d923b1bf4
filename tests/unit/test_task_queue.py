"""Which waiting picture the next idle worker gets."""

import asyncio
from typing import Any

import pytest

from server.telemetry.stages import ImageWork
from server.workers.group_share import GroupShare
from server.workers.slots import Task
from server.workers.task_queue import TaskQueue


class Queue(TaskQueue):
    """A queue whose tasks are named by their keys."""

    def __init__(self, workers: int = 4, share: float = 1.0) -> None:
        super().__init__(GroupShare(workers, share))
        self.tasks: dict[str, Task] = {}

    def add(self, key: str, group: str = "", **fields: Any) -> None:
        result: Any = asyncio.Future(loop=LOOP)
        task = Task(key, b"", b"", result, ImageWork(float(len(self.tasks))), group, **fields)
        self.tasks[key] = task
        self.append(task)

    def take(self) -> str | None:
        """A worker takes the next task."""
        task = self.next()
        if task is None:
            return None
        assert self.remove(task)
        self.entered(task)
        return task.key

    def done(self, key: str) -> None:
        self.left(self.tasks[key])


LOOP = asyncio.new_event_loop()


def test_the_oldest_is_first() -> None:
    queue = Queue()
    for key in "abc":
        queue.add(key)
    assert [queue.take() for _ in range(4)] == ["a", "b", "c", None]
    assert len(queue) == 0


def test_the_group_with_the_fewest_workers_is_first() -> None:
    queue = Queue()
    for key in ("a1", "a2", "a3", "b1", "a4", "b2"):
        queue.add(key, key[0])
    assert [queue.take() for _ in range(3)] == ["a1", "b1", "a2"]
    queue.done("a1")
    queue.done("a2")
    assert [queue.take() for _ in range(3)] == ["a3", "a4", "b2"]


def test_a_group_with_its_share_waits() -> None:
    queue = Queue(workers=4, share=0.5)
    for key in ("a1", "a2", "a3", "b1"):
        queue.add(key, key[0])
    assert [queue.take() for _ in range(4)] == ["a1", "b1", "a2", None]
    queue.done("a1")
    assert queue.take() == "a3"


def test_frames_of_an_animation_wait_while_it_is_in_a_worker() -> None:
    queue = Queue()
    queue.add("frame 2", sequence=7, frame=2)
    queue.add("frame 1", sequence=7, frame=1)
    queue.add("still")
    assert [task.key for task in queue.frames(queue.tasks["frame 2"])] == ["frame 1", "frame 2"]
    assert [queue.take() for _ in range(3)] == ["frame 2", "still", None]
    queue.done("frame 2")
    assert queue.take() == "frame 1"


def test_a_task_that_is_put_back_is_the_next_of_its_group() -> None:
    queue = Queue()
    for key in "abc":
        queue.add(key, pixels=10)
    assert [queue.take(), queue.take()] == ["a", "b"]
    assert queue.pixels == 20
    queue.done("a")
    queue.put_back(queue.tasks["a"])
    assert queue.pixels == 10
    assert [task.key for task in queue] == ["a", "c"]
    assert queue.take() == "a"


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_task_is_removed_once(key: str) -> None:
    queue = Queue()
    queue.add("a")
    queue.add("b")
    assert [queue.remove(queue.tasks[key]) for _ in range(2)] == [True, False]
    assert len(queue) == 1
    queue.clear()
    assert (len(queue), list(queue), queue.next()) == (0, [], None)


def test_to_look_for_a_task_does_not_copy_its_data() -> None:
    class Data(bytes):
        def __repr__(self) -> str:
            raise AssertionError("takes a tenth of a second for a large file")

    result: Any = asyncio.Future(loop=LOOP)
    gone = Task("gone", Data(), b"", result, ImageWork(0.0))
    queue = Queue()
    queue.add("other")
    assert not queue.remove(gone)

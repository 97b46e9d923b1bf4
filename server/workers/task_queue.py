"""What waits for an image worker, and what is in one.

To choose the next task takes time that grows with the number of waiting groups, and neither with
the number of workers nor with that of waiting pictures.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from server.workers.group_share import GroupShare
from server.workers.slots import Task


class TaskQueue:
    """Tasks in the order in which they came, by group of API keys.

    Attributes:
        pixels: those of all pictures that are in a worker, by their headers.
    """

    def __init__(self, share: GroupShare) -> None:
        self.pixels = 0
        self._share = share
        self._waiting: dict[str, deque[Task]] = {}
        self._length = 0
        self._working: Counter[str] = Counter()  # workers by group
        self._sequences: Counter[int] = Counter()  # workers by animation

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Task]:
        for tasks in self._waiting.values():
            yield from tasks

    def append(self, task: Task) -> None:
        """Let `task` wait."""
        self._share.asks(task.group)
        self._waiting.setdefault(task.group, deque()).append(task)
        self._length += 1

    def put_back(self, task: Task) -> None:
        """Let `task` wait again, before all others of its group."""
        self._waiting.setdefault(task.group, deque()).appendleft(task)
        self._length += 1

    def remove(self, task: Task) -> bool:
        """Returns whether `task` did wait."""
        tasks = self._waiting.get(task.group, deque())
        try:
            tasks.remove(task)
        except ValueError:
            return False
        self._length -= 1
        if not tasks:
            del self._waiting[task.group]
        return True

    def clear(self) -> None:
        """Drop all that wait."""
        self._waiting.clear()
        self._length = 0

    def entered(self, task: Task) -> None:
        """Note that a worker begins `task`."""
        self.pixels += task.pixels
        self._working[task.group] += 1
        if task.sequence is not None:
            self._sequences[task.sequence] += 1

    def left(self, task: Task) -> None:
        """Note that `task` is no longer in a worker."""
        self.pixels -= task.pixels
        _count_down(self._working, task.group)
        if task.sequence is not None:
            _count_down(self._sequences, task.sequence)

    def next(self) -> Task | None:
        """The task that is next: the first of the group that has the fewest workers. A group that
        has its share of them waits, and so do frames of an animation that is in a worker. The task
        goes on waiting until it is removed."""
        full: Sequence[str] = self._share.full(self._working) if self._waiting else ()
        heads = (self._head(tasks) for group, tasks in self._waiting.items() if group not in full)
        return min(
            (head for head in heads if head is not None),
            key=lambda task: (self._working[task.group], task.work.queued),
            default=None,
        )

    def _head(self, tasks: deque[Task]) -> Task | None:
        if not self._sequences:
            return tasks[0]
        return next((task for task in tasks if task.sequence not in self._sequences), None)

    def frames(self, first: Task) -> list[Task]:
        """All waiting tasks of the animation of `first`, in the order of their frames."""
        tasks = [task for task in self._waiting[first.group] if task.sequence == first.sequence]
        return sorted(tasks, key=lambda task: task.frame)


def _count_down(counter: Counter[Any], key: Any) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]

"""The requests whose bodies are arriving, by group of API keys."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Arrival:
    group: str
    began: float
    is_counted: bool = True


class Arrivals:
    """Counts bodies for some time from their heads on: slow ones must not keep others away."""

    def __init__(self, counted_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._counted_s = counted_s
        self._clock = clock
        self._oldest: deque[_Arrival] = deque()
        self._counts: Counter[str] = Counter()

    def count(self, group: str) -> int:
        """How many bodies of `group` have begun to arrive lately and are not complete."""
        too_old = self._clock() - self._counted_s
        while self._oldest and (self._oldest[0].began <= too_old or not self._oldest[0].is_counted):
            self._end(self._oldest.popleft())
        return self._counts[group]

    @contextmanager
    def one(self, group: str) -> Iterator[None]:
        """A body of `group` arrives during the block."""
        arrival = _Arrival(group, self._clock())
        self._oldest.append(arrival)
        self._counts[group] += 1
        try:
            yield
        finally:
            self._end(arrival)

    def _end(self, arrival: _Arrival) -> None:
        if arrival.is_counted:
            arrival.is_counted = False
            self._counts[arrival.group] -= 1
            if not self._counts[arrival.group]:
                del self._counts[arrival.group]

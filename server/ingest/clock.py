"""The clocks of this machine, as parts take them that depend on the time of day."""

from typing import Protocol


class Clock(Protocol):
    """The clocks of the module `time`, in seconds. The time of day may jump at any moment, when it
    is corrected; only `monotonic` measures durations."""

    def time(self) -> float: ...

    def monotonic(self) -> float: ...

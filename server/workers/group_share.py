"""Which groups of API keys have their share of the image workers."""

import time
from collections.abc import Mapping, Sequence

# A group counts as active for so long after it asked for a picture.
_ACTIVE_S = 10.0


class GroupShare:
    """While several groups are active, each has at most `share` of the workers, or one: the
    pictures of another would wait until one of a group that has all of them is done."""

    def __init__(self, workers: int, share: float) -> None:
        self._most = max(1, int(workers * share))
        self._is_limited = self._most < workers
        self._asked_at: dict[str, float] = {}  # the last to ask at the end

    def asks(self, group: str) -> None:
        """Note that a picture of `group` came."""
        if not self._is_limited:
            return
        now = time.monotonic()
        self._asked_at.pop(group, None)
        self._asked_at[group] = now
        while now - next(iter(self._asked_at.values())) > _ACTIVE_S:
            del self._asked_at[next(iter(self._asked_at))]

    def full(self, working: Mapping[str, int]) -> Sequence[str]:
        """The groups that get no further worker; `working` has the number of workers of each."""
        if len(self._asked_at) <= 1:
            return ()
        since = time.monotonic() - _ACTIVE_S
        active = sum(asked_at > since for asked_at in self._asked_at.values())
        if active <= 1:
            return ()
        return [group for group, count in working.items() if count >= self._most]

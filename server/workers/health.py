"""How well the image workers do: by their deaths since the last finished picture."""

import asyncio
import time
from dataclasses import dataclass, field

# This many deaths in a row without one finished picture make the pool unready, until one is
# finished or no worker has died for a while.
_HOPELESS_DEATHS = 5
_CALM_S = 15.0
_RESTART_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 5.0)


@dataclass
class Health:
    """`started` is set when all workers are up for the first time, or there is no hope of it."""

    started: asyncio.Event = field(default_factory=asyncio.Event)
    _died_at: list[float] = field(default_factory=list)

    def note_death(self) -> None:
        self._died_at.append(time.monotonic())

    def note_finished(self) -> None:
        self._died_at.clear()

    @property
    def is_hopeless(self) -> bool:
        return self._deaths() >= _HOPELESS_DEATHS

    @property
    def restart_delay_s(self) -> float:
        """The pause before the next start of a worker; it grows with the deaths in a row."""
        return _RESTART_DELAYS_S[min(self._deaths(), len(_RESTART_DELAYS_S) - 1)]

    def _deaths(self) -> int:
        """Deaths in a row; a calm time makes up for them as a finished picture does."""
        if self._died_at and time.monotonic() - self._died_at[-1] > _CALM_S:
            self._died_at.clear()
        return len(self._died_at)

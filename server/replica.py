"""One of the servers of `saccade serve --replicas`, and what it has in common with the others."""

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server import early_flags

FLAG = "--replicas"
MOST = 64
USAGE_BYTES = 4 << 20
# Set for each replica by the process that starts them.
_VARIABLE = "_SACCADE_REPLICA"


def asked_for(words: Sequence[str]) -> int:
    """How many replicas a command line of `serve` asks for, as far as can be told without vLLM's
    parser."""
    default = os.environ.get("SACCADE_REPLICAS", "1")
    return early_flags.number(words, FLAG, default=default)


@dataclass(frozen=True)
class Replica:
    """One of `count` replicas. The first one, with the index 0, has the uploaded files and the
    batches.

    Attributes:
        folder: for sockets.
        usage: a file in memory for the limits of API keys (`request.shared_usage`).
        has_cores: whether its cores are its own, and not shared by all.
    """

    index: int
    count: int
    folder: Path
    usage: Path
    has_cores: bool

    @classmethod
    def current(cls) -> "Replica | None":
        """This process; None if it is not one of several replicas."""
        text = os.environ.get(_VARIABLE)
        if text is None:
            return None
        index, count, folder, usage, has_cores = json.loads(text)
        return cls(index, count, Path(folder), Path(usage), has_cores)

    def variable(self) -> dict[str, str]:
        """By which its process knows itself, as `current`."""
        given = [self.index, self.count, str(self.folder), str(self.usage), self.has_cores]
        return {_VARIABLE: json.dumps(given)}

    @property
    def name(self) -> str:
        return f"replica {self.index}"

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / f"replica-{self.index}"

    def files_marker(self) -> Path:
        """Exists while the first replica has uploaded files."""
        return self.folder / "has-files"

    def usage_memory(self) -> mmap.mmap:
        with self.usage.open("r+b") as file:
            return mmap.mmap(file.fileno(), USAGE_BYTES)

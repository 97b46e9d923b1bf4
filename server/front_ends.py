"""Several front ends over the same engines (`--api-server-count`): what they share, and how they
are told apart.

    supervisor -> engine host: starts and watches the engines
               -> front ends: each an event loop with an HTTP side and image workers of its own

All are forks of the supervisor, and end with it. They have a listening socket in common, memory for
a few numbers, and a folder with a socket for each.
"""

import json
import mmap
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import early_flags

FLAG = "--api-server-count"
MOST = 64
# Names of sockets have at most 107 bytes, those in the folder up to 14.
MOST_PATH_BYTES = 90
# The exit status of a front end whose engines have died.
ENGINES_LOST = 4
# The load of a front end that accepts no connections.
NOT_ACCEPTING = 2**31 - 1
_MAX_MESSAGE_BYTES = 1 << 16


def asked_for(words: Sequence[str]) -> bool:
    """Whether a command line of `serve` asks for several front ends, as far as can be told without
    vLLM's parser."""
    return early_flags.number(words, FLAG, "-asc") > 1


class Link:
    """One end of a line between the supervisor and one of its processes: messages are JSON objects,
    with open files."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @classmethod
    def pair(cls) -> tuple["Link", "Link"]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: dict[str, Any], files: Sequence[int] = ()) -> bool:
        """Returns whether the other end is still there."""
        try:
            socket.send_fds(self._end, [json.dumps(message).encode()], files)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its files; None if the other end is gone. Blocks."""
        try:
            data, files, _, _ = socket.recv_fds(self._end, _MAX_MESSAGE_BYTES, 4)
        except OSError:
            return None
        return (json.loads(data), files) if data else None

    def close(self) -> None:
        self._end.close()


@dataclass(frozen=True)
class Engines:
    """What a front end must know to reach the engines.

    Attributes:
        address: for people, where the server listens.
        stats: where the coordinator of several engines publishes their load.
        image_work: the file by which the engines learn of image work, on a CPU.
        alive: a pipe that ends with the engines.
        hello: {identity: first message} of each engine, which it sends once; empty at the start.
    """

    address: str
    stats: str | None
    image_work: str | None
    alive: int
    hello: dict[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontEnd:
    """One of `count` front ends, and what it shares with the others. The first one, with the index
    0, has the uploaded files and the batches.

    Attributes:
        folder: for sockets.
        loads: the open connections of each front end.
        restarts: how often each was started again.
        usage: memory for the limits of API keys (`request.shared_usage`).
    """

    index: int
    count: int
    folder: Path
    listening: socket.socket
    engines: Engines
    loads: memoryview
    restarts: memoryview
    usage: mmap.mmap
    link: Link

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, total: int) -> int:
        """This one's part of `total`, at least 1."""
        return max(1, total // self.count + (self.index < total % self.count))

    def files_marker(self) -> Path:
        """Exists while the first front end has uploaded files."""
        return self.folder / "has-files"

    def peer_socket(self, index: int) -> Path:
        """Where a front end answers the others."""
        return self.folder / f"front-end-{index}"


def addresses(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """Where the engines reach each front end: of their inputs, and of their outputs."""
    return (
        [f"ipc://{folder}/inputs-{index}" for index in range(count)],
        [f"ipc://{folder}/outputs-{index}" for index in range(count)],
    )


def control_address(folder: Path, index: int) -> str:
    """Where the embedding caches report to a front end."""
    return f"ipc://{folder}/embeddings-{index}"


def encoder_address(folder: Path, index: int) -> str:
    """Where vLLM's workers report runs of the encoder to a front end."""
    return f"ipc://{folder}/encoder-{index}"


def usage_lock(folder: Path) -> Path:
    """What `request.shared_usage` locks."""
    return folder / "usage.lock"


def shared_numbers(count: int) -> memoryview:
    """Memory for `count` integers that forks of this process share."""
    return memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")[:count]

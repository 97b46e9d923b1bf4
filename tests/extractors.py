"""An extractor for pool tests that executes the command in the picture's bytes."""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from server.errors import InvalidImage
from server.imaging import pdf
from server.imaging.decode import Decoded, DecodeOptions, OpenAnimation, decode
from server.workers import protocol
from server.workers.jobs import PictureJob, ProcessJob, decode_kwargs
from server.workers.shared_memory import Segment
from server.workers.worker import Array, Extractor, Feature
from tests import intrusions

# In a file, what makes its job wait for a test; behind it is a path of `wait_in_stage`.
HELD = b"\n%held "


# The frame of an animation at which it waits.
HELD_FRAME = 3


def wait_in_stage(path: Path) -> None:
    """Create `path` with the suffix `.begun`, and wait until `path` exists."""
    path.with_suffix(".begun").touch()
    while not path.exists():
        time.sleep(0.005)


class HeldArray(np.ndarray[Any, Any]):
    """Waits for the file `path` when it is copied into the memory of the result."""

    path: Path
    asked = 0

    @property
    def nbytes(self) -> int:  # asked for the layout, and again for the copy
        self.asked += 1
        if self.asked == 2:
            wait_in_stage(self.path)
        return super().nbytes


class Commanded:
    """`data` is a command and its argument: "sleep 0.5", "wait-for PATH", "die", "large 9"..."""

    files = ()
    needs_files = False

    def __init__(self) -> None:
        self._data = b""

    def decode(
        self, data: bytes, job: PictureJob, animation: OpenAnimation | None = None
    ) -> Decoded:
        self._data = data
        if HELD in data and job.frame >= HELD_FRAME * (job.format == "GIF"):
            wait_in_stage(Path(os.fsdecode(data.partition(HELD)[2])))
        if job.format == "GIF":
            return decode(data, DecodeOptions(frame=job.frame), None, animation)
        if job.format == "PDF":
            return Decoded(pdf.render(data, job.frame, job.size), job.size)
        return Decoded(Image.new("RGB", (8, 6)), (8, 6))

    def features(self, decoded: Decoded, job: ProcessJob) -> dict[str, Feature]:
        if job.format == "GIF":
            return {"pixel": Array("uint8", np.asarray(decoded.image)[0, 0]), "pid": os.getpid()}
        command, _, argument = self._data[:200].decode(errors="replace").partition(" ")
        argument = argument.split("\n")[0]
        if command == "sleep":
            time.sleep(float(argument))
        elif command == "wait-for":
            while not Path(argument).exists():
                time.sleep(0.01)
        elif command == "count":
            with Path(argument).open("a") as file:
                file.write("x")
        elif command == "die" or (command == "die-once" and not Path(argument).exists()):
            if command == "die-once":
                Path(argument).touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        elif command == "signal":
            os.kill(os.getpid(), int(argument))
        elif command == "stop-once" and not Path(argument).exists():
            Path(argument).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        elif command == "work":
            while True:
                pass
        elif command == "render":  # a real PDF
            pdf.render(self._data.split(b"\n", 1)[1], 0, (4000, 4000))
        elif command == "intrude":
            return {"found": ", ".join(intrusions.not_prevented(int(argument)))}
        elif command == "say":
            print(argument * 1000, file=sys.stderr)
        elif command == "hold-result":
            held = np.frombuffer(self._data, np.uint8).view(HeldArray)
            held.path = Path(argument)
            return {"bytes": Array("uint8", held)}
        elif command == "too-long":
            return {"list": list(range(100_000))}
        elif command == "rogue":
            _send_rogue_reply(*argument.split())
        elif command == "refuse":
            raise InvalidImage("refused")
        elif command == "raise":
            raise RuntimeError("with a secret path /etc/passwd")
        size = int(argument) if command == "large" else 4
        return {
            "bytes": Array("uint8", np.frombuffer(self._data, np.uint8)),
            "floats": Array("float32", np.full((2, size), os.getpid(), np.float32)),
            "list": [Array("int64", np.arange(3)), 7, "text", None],
            "option": str(decode_kwargs(job.kwargs).get("option")),
        }


def _send_rogue_reply(kind: str, job_id: str) -> None:
    """Send a malicious reply over the worker's own socket."""
    done = protocol.Done(int(job_id), 99, 1 << 30, False, [], {}, (8, 6), 0.0, 0.0)
    fds: list[int] = []
    if kind == "other-job":
        done = msgspec.structs.replace(done, id=int(job_id) + 7)
    elif kind == "unknown-dropped":
        done = msgspec.structs.replace(done, dropped=[7])
    elif kind == "no-descriptor":
        done = msgspec.structs.replace(done, is_new=True)
    elif kind == "too-small":
        done, fds = msgspec.structs.replace(done, is_new=True), [Segment.create(1).fd]
    elif kind == "no-memory":
        done, fds = msgspec.structs.replace(done, is_new=True), [os.open("/dev/null", os.O_RDWR)]
    data = b"\xc1 garbage" if kind == "garbage" else protocol.encoder.encode(done)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=os.dup(fd))
            if connection.type == socket.SOCK_SEQPACKET:
                socket.send_fds(connection, [data], fds)
    time.sleep(60)


# Such as a library's connection to a model hub.
_left_open: list[socket.socket] = []


def load(payload: bytes) -> Extractor:
    _left_open.extend(socket.socketpair())
    assert payload == b"payload"
    return Commanded()

"""An extractor for pool tests that does what the picture's bytes say."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from server.errors import InvalidImage
from server.imaging.decode import Decoded
from server.workers.jobs import PictureJob, ProcessJob, decode_kwargs
from server.workers.worker import Array, Extractor, Feature


class Commanded:
    """`data` is a command and its argument: "sleep 0.5", "wait-for PATH", "die", "large 9"..."""

    def __init__(self) -> None:
        self._data = b""

    def decode(self, data: bytes, job: PictureJob) -> Decoded:
        self._data = data
        return Decoded(Image.new("RGB", (8, 6)), (8, 6))

    def features(self, decoded: Decoded, job: ProcessJob) -> dict[str, Feature]:
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
            os.kill(os.getpid(), signal.SIGKILL)
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


def load(payload: bytes) -> Extractor:
    assert payload == b"payload"
    return Commanded()

"""Decodes files in a process that has only what the forkserver of image workers loads.

    python -m tests.confined_decode require off < files > hashes

The files are a list in MessagePack. The arguments are modes of the sandbox: for each, a fork
decodes all files, and writes the results as a line of JSON.
"""

import hashlib
import os
import sys

import msgspec

from server.imaging import pdf
from server.imaging.convert import array_of
from server.imaging.decode import DecodeOptions, decode, warm_up
from server.workers import confinement


def decoded(data: bytes) -> str:
    """The hash of the pixels of a file, or the error that refuses it."""
    try:
        if data.startswith(b"%PDF"):
            image = pdf.render(data, 0, (300, 200))
        else:
            image = decode(data, DecodeOptions(max_pixels=20_000_000), lambda *_: (64, 48)).image
        return hashlib.sha256(array_of(image).tobytes()).hexdigest()
    except Exception as error:
        return str(error)


def decode_confined(files: list[bytes], mode: confinement.SandboxMode) -> None:
    """Write the results for all files, decoded with the sandbox `mode`."""
    confined = confinement.confine(mode, confinement.FONT_DIRECTORIES)
    assert confined.seccomp == (mode != "off")
    sys.stdout.buffer.write(msgspec.json.encode(list(map(decoded, files))) + b"\n")
    sys.stdout.flush()


def main(modes: list[confinement.SandboxMode]) -> None:
    """Decode all files once with each of `modes`, in forks as the workers are."""
    files = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=list[bytes])
    warm_up()
    confinement.prepare()
    for mode in modes:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                decode_confined(files, mode)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main(sys.argv[1:])  # type: ignore[arg-type]

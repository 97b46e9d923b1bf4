"""Imported once by the forkserver: loads the extractor that all workers then share.

The environment variable `SPEC_VARIABLE` names a file with a `WorkerSpec`. If it is not set,
importing this module loads nothing.
"""

import functools
import os
from pathlib import Path

import msgspec

from server.imaging.decode import warm_up
from server.workers.process import die_with_parent
from server.workers.worker import Extractor, WorkerSpec

SPEC_VARIABLE = "_SACCADE_WORKER_SPEC"


@functools.cache
def extractor() -> Extractor:
    """The extractor of this process, built at the first call."""
    spec_file = Path(os.environ[SPEC_VARIABLE])
    return msgspec.msgpack.decode(spec_file.read_bytes(), type=WorkerSpec).load()


if SPEC_VARIABLE in os.environ:
    die_with_parent()
    warm_up()
    extractor()

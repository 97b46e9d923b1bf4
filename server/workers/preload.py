"""Imported once by the process that image workers are forked from: loads the extractor.

The file named by `SPEC_VARIABLE` holds a `WorkerSpec`; without it nothing is loaded here and each
worker that asks loads its own.
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
    spec_file = Path(os.environ[SPEC_VARIABLE])
    return msgspec.msgpack.decode(spec_file.read_bytes(), type=WorkerSpec).load()


if SPEC_VARIABLE in os.environ:
    die_with_parent()
    warm_up()
    extractor()

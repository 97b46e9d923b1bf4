"""Loads vLLM once for all processes of these tests.

Torch uses one thread, as in an image worker: many threads on few cores are slow.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

import server.engine.clips  # noqa: F401  - what the decoders of videos need from vLLM
from tests.forked import FORKSERVER
from tests.http_server import run_short_of_files

torch.set_num_threads(1)
# Both are forked before the tests are collected, because their modules decode pictures in threads.
FORKSERVER.preload()
_fork = multiprocessing.get_context("fork")
_ours, _theirs = _fork.Pipe()
_scarce = _fork.Process(target=run_short_of_files, args=(60, _theirs), daemon=True)
_scarce.start()


@pytest.fixture(scope="session", autouse=True)
def forkserver_of_decoders() -> Iterator[None]:
    """Stop the forkserver at the end."""
    yield
    FORKSERVER.close()


@pytest.fixture
def short_of_files() -> Iterator[tuple[BaseProcess, Connection]]:
    """The process that runs `run_short_of_files`. Only one test can use it."""
    yield _scarce, _ours
    _scarce.kill()
    _scarce.join()
    _ours.close()

"""Torch uses one thread, as in an image worker: many threads on few cores are slow. Stand-ins for
missing packages can be imported from the start, since transformers looks for them only once."""

import sys
from collections.abc import Iterator

import pytest
import torch

from tests import families

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def import_stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = str(families.import_stubs(tmp_path_factory.mktemp("stubs")))
    sys.path.insert(0, path)
    yield
    sys.path.remove(path)

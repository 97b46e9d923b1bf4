"""Sleeping waits in vLLM's processes: only when this server asked for them."""

import subprocess
import sys

import pytest

CODE = """
from server.engine import torchvision_ops
from server.engine.vllm_adapter import cpu_waits
torchvision_ops.register()
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.utils import sched_yield
{ask}
from vllm.plugins import load_general_plugins
load_general_plugins()
print(shm_broadcast.sched_yield is sched_yield)
"""


@pytest.mark.parametrize(("ask", "untouched"), [("", "True"), ("cpu_waits.ask()", "False")])
def test_vllm_is_changed_only_on_request(ask: str, untouched: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(ask=ask)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-1:] == [untouched], done.stderr

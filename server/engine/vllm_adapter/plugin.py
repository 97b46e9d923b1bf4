"""The plugin that vLLM loads in each of its processes, by the entry points of the package.

The server asks for what it wants changed there with `ask`, before it starts the engine. The wishes
reach vLLM's processes in one environment variable. A plain vLLM in the same environment has no such
variable, and stays what it is, except that it also knows the families of `server.engine.models`.
"""

import ctypes
import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.engine import models

if TYPE_CHECKING:
    import torch

_VARIABLE = "_SACCADE_PLUGIN"


class Changes(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to change in vLLM's processes.

    Attributes:
        die_with_parent: end with the process that started them, however it ends. If the kernel
            kills the server, it cannot stop its children, and an engine would keep the GPU.
        return_memory: return freed heap to the system regularly.
        quick_start: start processes as `quick_start` does.
        json_logs: write logs as JSON.
        image_work: the file by which `cpu_waits` learns when there is image work.
        encoder_runs: the addresses to which `encode_timer` reports.
        segments: what the names of segments in /dev/shm begin with.
        clients: how many front ends an engine serves that its own process did not start; 0 if none.
    """

    die_with_parent: bool = False
    return_memory: bool = False
    quick_start: bool = False
    json_logs: bool = False
    image_work: str | None = None
    encoder_runs: tuple[str, ...] = ()
    segments: str | None = None
    clients: int = 0


def asked() -> Changes:
    """What was asked for, in this process or in the one that started it."""
    text = os.environ.get(_VARIABLE)
    return Changes() if text is None else msgspec.json.decode(text, type=Changes)


def ask(**changes: Any) -> None:
    """Ask for `changes`, by the fields of `Changes`, in the vLLM processes that are started from
    now on."""
    changed = msgspec.structs.replace(asked(), **changes)
    os.environ[_VARIABLE] = msgspec.json.encode(changed).decode()


def forget() -> None:
    """Ask for nothing."""
    os.environ.pop(_VARIABLE, None)


def register() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    models.register()
    changes = asked()
    if changes.die_with_parent:
        _die_with_parent()
    if changes.return_memory and multiprocessing.parent_process() is not None:
        from server.workers.memory import return_regularly

        return_regularly()
    if changes.quick_start:
        from server.engine.vllm_adapter import quick_start

        quick_start.register()
    if changes.json_logs:
        from server.telemetry import log

        log.use_json()
    if changes.segments is not None:
        from server.engine.vllm_adapter import shared_segments

        shared_segments.register(changes.segments)
    if changes.image_work is not None:
        from server.engine.vllm_adapter import cpu_waits

        cpu_waits.register(changes.image_work)
    if changes.clients:
        from server.engine.vllm_adapter import client_caches

        client_caches.register(changes.clients)
    if changes.encoder_runs:
        from server.engine.vllm_adapter import encode_timing

        encode_timing.register(changes.encoder_runs)


def _die_with_parent() -> None:
    from server.workers.process import die_with_parent

    if (parent := multiprocessing.parent_process()) is not None:
        die_with_parent(parent.pid)


# ---------------------------------------------------------------------- torchvision on a CPU
# The torchvision wheel on the package index is a CUDA build. Beside a CPU build of torch its C
# extension does not load, and then `import torchvision` fails: it describes operators that the
# extension would have declared. The transforms that image processors use need none of these
# operators, so it is enough to declare their schemas.

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# The operators live as long as this library object does.
_library: "torch.library.Library | None" = None


def register_platform() -> None:
    """Entry point of the group `vllm.platform_plugins`, which vLLM calls early in each process.

    Returns None, which tells vLLM that this package adds no platform.
    """
    make_torchvision_importable()


def make_torchvision_importable() -> None:
    """Declare torchvision's operator schemas if its C extension does not load.

    Declaring a schema a second time would remove the operator, so this does nothing where the
    extension loads.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _extension_loads(spec.submodule_search_locations or []):
        return
    import torch

    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        _library.define(schema)  # type: ignore[no-untyped-call]


def _extension_loads(package_dirs: list[str]) -> bool:
    for extension in (so for folder in package_dirs for so in Path(folder).glob("_C*.so")):
        try:
            ctypes.CDLL(str(extension))
        except OSError:
            continue
        return True
    return False

"""Lets `import torchvision` work beside a CPU build of torch.

The torchvision wheel on the package index is a CUDA build. Beside a CPU torch its C extension
cannot be loaded, and then the import dies, because it describes operators (`torchvision::nms`,
`torchvision::qnms`) that the extension would have declared. The transforms that image processors
use need none of these operators, so declaring their schemas is the whole cure. Where the
extension loads, nothing is done: a schema that is declared twice removes the operator.

vLLM calls `register` early in each of its processes (entry point `vllm.platform_plugins`).
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# The operators live as long as this library object does.
_library: torch.library.Library | None = None


def register() -> None:
    """Declare torchvision's operator schemas if, and only if, its C extension cannot be loaded.

    Returns None, which tells vLLM that this is not a platform of its own.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _extension_loads(spec.submodule_search_locations or []):
        return
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

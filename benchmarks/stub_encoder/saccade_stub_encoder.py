"""A vLLM plugin that replaces the vision encoder of the Qwen-VL families by a stub.

On a CPU the encoder takes most of the time of a request, so a benchmark there would show little
else. With the stub, each server's front end behaves as it would with a GPU that encodes at no
cost. Answers are meaningless; token counts and tensor shapes are correct.

With `STUB_LAYERS` in the environment, the layers of the Qwen language models are stubs too: they
pass their input on. What is left of the engine is vLLM's scheduler, its preparation of each step,
the sampler, and the messages between processes, as on a GPU that computes at no cost.

This folder does not need to be installed: with it on PYTHONPATH, vLLM finds the plugin through the
entry point in the `dist-info` folder beside this file, in each of its processes.
"""

import importlib
import os
from pathlib import Path
from typing import Any

import torch

REPORT_VARIABLE = "STUB_ENCODER_REPORT"
"""Names a folder in which every process that used the stub leaves a file named by its id."""

LAYERS_VARIABLE = "STUB_LAYERS"

_LAYERS = {
    "vllm.model_executor.models.qwen2": "Qwen2DecoderLayer",
    "vllm.model_executor.models.qwen3": "Qwen3DecoderLayer",
}
_ENCODERS = {
    "vllm.model_executor.models.qwen2_vl": "Qwen2VisionTransformer",
    "vllm.model_executor.models.qwen2_5_vl": "Qwen2_5_VisionTransformer",
    "vllm.model_executor.models.qwen3_vl": "Qwen3_VisionTransformer",
}


def register() -> None:
    """Patch the encoders; called by vLLM, possibly more than once in a process."""
    for module, encoder in _ENCODERS.items():
        getattr(importlib.import_module(module), encoder).forward = _forward
    if os.environ.get(LAYERS_VARIABLE):
        for module, layer in _LAYERS.items():
            getattr(importlib.import_module(module), layer).forward = _pass_on


def _forward(
    encoder: Any, pixels: torch.Tensor, grid_thw: object = None, **_: object
) -> torch.Tensor:
    """Return one constant row per merged patch, as wide as the encoder's own result.

    With deepstack levels, `out_hidden_size` includes their columns.
    """
    _report()
    rows = pixels.shape[0] // encoder.spatial_merge_size**2
    size = (rows, encoder.out_hidden_size)
    return torch.full(size, 0.01, dtype=encoder.dtype, device=encoder.device)


def _pass_on(
    _: Any, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states and residual of a layer, which are those before it."""
    return hidden_states, torch.zeros_like(hidden_states) if residual is None else residual


def _report() -> None:
    folder = os.environ.get(REPORT_VARIABLE)
    if folder:
        Path(folder, str(os.getpid())).touch()

"""How much `--image-decode fast` changes the features, compared with a full decode.

    python -m benchmarks.fidelity

For photos of several sizes, the features of both ways are compared: peak signal-to-noise ratio in
dB, mean and largest difference in grey levels (0..255). The reference point is the effect of one
step of JPEG quality on the same photo, decoded in full. No engine is needed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.photos import photo
from server.workers.jobs import ProcessJob
from server.workers.worker import Array, Extractor

_SIZES = ((1280, 720), (1920, 1080), (4000, 3000), (8000, 6000))
_QUALITY = 88


def main() -> None:
    """Print and save a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="server/demo")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    fast, exact = (_extractor(options.model, fast=fast) for fast in (True, False))
    rows = [_row(fast, exact, size) for size in _SIZES]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    result = {"what": "fidelity", "model": options.model, **environment.describe(), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _extractor(model: str, *, fast: bool) -> Extractor:
    from server.engine.vllm_adapter import plugin

    plugin.make_torchvision_importable()
    from vllm.engine.arg_utils import AsyncEngineArgs

    from server.engine.extractor import worker_spec

    config = AsyncEngineArgs(model=model, dtype="float32").create_model_config()
    return worker_spec(config, fast=fast, max_pixels=100_000_000).load()


def _row(fast: Extractor, exact: Extractor, size: tuple[int, int]) -> dict[str, Any]:
    file = photo(*size, 1, _QUALITY)
    job = ProcessJob("JPEG", size)
    decoded = fast.decode(file, job)
    moved = _pixels(fast, file, job)
    whole = _pixels(exact, file, job)
    other = _pixels(exact, photo(*size, 1, _QUALITY - 1), job)
    return {
        "size": f"{size[0]}x{size[1]}",
        "decoded_at": f"{decoded.image.width}x{decoded.image.height}",
        "psnr_db": _psnr(moved, whole),
        "mean_grey_levels": round(float(np.abs(moved - whole).mean()), 2),
        "max_grey_levels": int(np.abs(moved - whole).max()),
        "psnr_of_one_quality_step_db": _psnr(other, whole),
    }


def _pixels(
    extractor: Extractor, file: bytes, job: ProcessJob
) -> np.ndarray[Any, np.dtype[np.float64]]:
    value = extractor.features(extractor.decode(file, job), job)["pixel_values"]
    assert isinstance(value, Array)
    assert value.dtype == "uint8"
    return value.data.astype(np.float64)


def _psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    error = float(((a - b) ** 2).mean())
    return round(10 * np.log10(255**2 / error), 1) if error else float("inf")


if __name__ == "__main__":
    main()

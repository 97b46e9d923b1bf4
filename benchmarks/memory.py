"""The memory that an image worker takes for a picture of 100 megapixels, in every format and mode.

    python -m benchmarks.memory --output FILE [--files DIR] [--only TEXT]

Each picture is decoded and preprocessed with the processor of a model in a process that is forked
from one with everything loaded, as an image worker is. The peak is that of its resident memory
(VmHWM) above the memory before, with the file loaded. `--most` ends the run with an error if a peak
is above so many MB.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import environment, large_pictures
from server.errors import SaccadeError
from server.imaging import header
from server.imaging.convert import array_of
from server.imaging.decode import warm_up
from server.workers.jobs import DecodeIO, ProcessJob
from server.workers.memory import keep_freed_memory
from server.workers.worker import Extractor

# Modes to convert to, besides RGB, which clients can ask for.
_MODES = (None, "1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
_CONVERTED = ("JPEG", "PNG RGBA 8", "TIFF CMYK")


def main() -> None:
    """Measure, print and save the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="server/demo")
    parser.add_argument("--files", type=Path, default=Path("/tmp/saccade-large-pictures"))
    parser.add_argument("--only", default="", help="measure files whose name begins with this")
    parser.add_argument("--decode", choices=("fast", "exact"), help="measure only one of the two")
    parser.add_argument("--most", type=float, help="the largest peak to accept, in MB")
    options = parser.parse_args()
    options.files.mkdir(exist_ok=True)
    extractors = _extractors(options.model)
    if options.decode is not None:
        extractors = {options.decode: extractors[options.decode]}
    rows = []
    for name, make in large_pictures.makers().items():
        if name.startswith(options.only):
            for row in _measured(name, _file(options.files, name, make), extractors):
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                rows.append(row)
    result = {"what": "memory", "model": options.model, **environment.describe(), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    largest = max(row["peak_mb"] for row in rows)
    print(f"largest: {largest} MB")
    if options.most is not None and largest > options.most:
        sys.exit(f"the largest peak is above {options.most} MB")


def _extractors(model: str) -> dict[str, Extractor]:
    """The extractors by the value of `--image-decode`."""
    from server.engine.vllm_adapter import plugin

    plugin.make_torchvision_importable()
    from vllm.engine.arg_utils import AsyncEngineArgs

    from server.engine.extractor import worker_spec

    keep_freed_memory(192 << 20)
    vars(Image)["core"].set_blocks_max(8)
    warm_up()
    config = AsyncEngineArgs(model=model, dtype="float32").create_model_config()
    return {
        how: worker_spec(config, fast=how == "fast", max_pixels=100_000_000).load()
        for how in ("fast", "exact")
    }


def _file(folder: Path, name: str, make: Callable[[], bytes]) -> Path:
    """The file, which is made in another process if it does not exist."""
    path = folder / re.sub(r"\W+", "-", name)
    if not path.exists():
        if (pid := os.fork()) == 0:
            try:
                path.with_suffix(".part").write_bytes(make())
                path.with_suffix(".part").rename(path)
            except BaseException as error:
                print(f"failed to make {name}: {error!r}", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    return path


def _measured(name: str, path: Path, extractors: dict[str, Extractor]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    frame = 1 if name.endswith("frame 1") else 0
    for how, extractor in extractors.items():
        yield {"file": name, "decode": how, **_peak(extractor, path, frame, "RGB")}
    if name in _CONVERTED and "exact" in extractors:
        for mode in _MODES:
            peak = _peak(extractors["exact"], path, frame, mode)
            yield {"file": f"{name} to {mode}", "decode": "exact", **peak}


def _peak(extractor: Extractor, path: Path, frame: int, mode: str | None) -> dict[str, Any]:
    """Decode and preprocess in a forked process."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            answer = json.dumps(_run(extractor, path.read_bytes(), frame, mode))
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(answer) if answer else {"peak_mb": 1e9, "result": "died"}
    return found


def _run(extractor: Extractor, data: bytes, frame: int, mode: str | None) -> dict[str, Any]:
    side = large_pictures.SIDE
    known = header.ImageHeader("PDF", side, side) if data[:4] == b"%PDF" else header.read(data)
    job = ProcessJob(known.format, known.size, frame, io=DecodeIO(mode))
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _memory("VmRSS"), time.process_time()
    try:
        decoded = extractor.decode(data, job)
        decode_mb = _peak_mb(before)
        if mode == "RGB":
            extractor.features(decoded, job)
        else:
            array_of(decoded.image)
        result = f"{decoded.image.width}x{decoded.image.height}"
    except SaccadeError as error:
        decode_mb = _peak_mb(before)
        result = error.code
    cpu_s = round(time.process_time() - started, 2)
    return {"peak_mb": _peak_mb(before), "decode_mb": decode_mb, "cpu_s": cpu_s, "result": result}


def _peak_mb(before: int) -> int:
    return round((_memory("VmHWM") - before) * 1024 / 1e6)


def _memory(name: str) -> int:
    """In KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main()

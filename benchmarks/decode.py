"""The cost of decoding: this project's decoders against the alternatives.

    python -m benchmarks.decode --output benchmarks/results/2026-11-20-decode.json

Each candidate decodes a file for the size that a model's processor produces. The picture is then
resized as the processor does it (torchvision, bicubic, antialiased, uint8).
Candidates take turns. The time is CPU time of the process with all threads, since a pool of workers
keeps all cores busy; wall time is in the file too. Fidelity is the peak signal-to-noise ratio
against the whole picture, resized. Peak memory is measured in a separate process (VmHWM), above
its memory before decoding, with the file loaded.

Allocators are set as in an image worker. libvips, OpenCV and torch have one thread each.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks import environment, photos
from server.engine.vllm_adapter import plugin
from server.imaging.decode import DecodeOptions, decode
from server.imaging.sizing import FixedSize
from server.workers.memory import keep_freed_memory

Pixels = NDArray[np.uint8]
Size = tuple[int, int]
Candidate = Callable[[bytes, Size], Any]

_PACKAGES = ("pillow", "pyvips-binary", "opencv-python-headless", "simplejpeg", "deflate", "numba")
_LARGE = 10_000


@dataclass(frozen=True)
class Case:
    """A file, and its final size (width, height); None: its own."""

    name: str
    data: bytes
    target: Size | None
    candidates: dict[str, Candidate]


def main() -> None:
    """Measure, print the tables and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    options = parser.parse_args()
    memory = [] if options.no_memory else list(_peaks())
    _as_worker()
    times = [row for case in _cases() for row in _timed(case, options.repeats)]
    print(_table(times))
    print(_table(memory))
    described = environment.describe()
    described["versions"] |= {name: metadata.version(name) for name in _PACKAGES}
    result = {"what": "decode", **described, "repeats": options.repeats}
    result |= {"times": times, "memory": memory}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def _as_worker() -> None:
    """Allocators and threads as in an image worker."""
    import cv2
    import torch

    plugin.make_torchvision_importable()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    keep_freed_memory(192 << 20)
    vars(Image)["core"].set_blocks_max(8)
    gc.freeze()


# ------------------------------------------------------------------ candidates


def _ours(data: bytes, target: Size) -> Image.Image:
    return decode(data, DecodeOptions(), FixedSize(*target).target).image


def _ours_exact(data: bytes, target: Size) -> Image.Image:
    return decode(data, DecodeOptions()).image


def _loader(data: bytes, target: Size) -> Image.Image:
    """Decodes like vLLM's loader."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return image if image.mode == "RGB" else image.convert("RGB")


def _drafted(data: bytes, target: Size) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", target)
    image.load()
    return image


def _vips(data: bytes, target: Size) -> Pixels:
    vips = _library()
    image = vips.Image.new_from_buffer(data, "", access="sequential", fail_on="warning")
    return _array(image.icc_import() if image.interpretation == "cmyk" else image)


def _vips_thumbnail(data: bytes, target: Size) -> Pixels:
    width, height = target
    return _array(_library().Image.thumbnail_buffer(data, width, height=height, size="force"))


def _vips_shrunk(factor: int, loader: str, **options: Any) -> Candidate:
    def run(data: bytes, target: Size) -> Pixels:
        image = getattr(_library().Image, loader)(data, access="sequential", **options)
        return _array(image if options else image.shrink(factor, factor))

    return run


def _array(image: Any) -> Pixels:
    """Three channels of a libvips picture."""
    if image.hasalpha():
        image = image.flatten(background=[255])
    if image.bands == 1:
        image = image.bandjoin([image, image])
    shape = image.height, image.width, 3
    return np.frombuffer(image.cast("uchar").write_to_memory(), np.uint8).reshape(shape)


def _library() -> Any:
    import pyvips

    pyvips.vips_lib.vips_concurrency_set(1)
    pyvips.cache_set_max(0)
    return pyvips


def _opencv(flag: int) -> Candidate:
    def run(data: bytes, target: Size) -> Pixels:
        import cv2

        found: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        return np.asarray(cv2.cvtColor(found, cv2.COLOR_BGR2RGB), np.uint8)

    return run


def _heif(data: bytes, target: Size) -> Pixels:
    import pillow_heif

    pillow_heif.options.DECODE_THREADS = 1
    return np.asarray(pillow_heif.open_heif(io.BytesIO(data))[0])


def _finished(picture: Any, target: Size | None) -> Pixels:
    """As `engine.extractor` resizes for the Qwen-VL families: uint8 (3, height, width)."""
    import torch
    import torchvision.transforms.v2.functional as tv

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # some of these arrays are read-only, which is fine: nothing writes to them
        planes = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)
    if target is not None and planes.shape[1:] != target[::-1]:
        bicubic = tv.InterpolationMode.BICUBIC
        planes = tv.resize(planes, list(target[::-1]), interpolation=bicubic, antialias=True)
    done: Pixels = planes.contiguous().numpy()
    return done


# ------------------------------------------------------------------ cases

_OURS = {"this project, fast": _ours, "this project, exact": _ours_exact}
_PILLOW: dict[str, Candidate] = {"Pillow, as vLLM's loader": _loader}
_VIPS: dict[str, Candidate] = {"libvips": _vips}
_THUMBNAIL: dict[str, Candidate] = {"libvips thumbnail": _vips_thumbnail}
_OPENCV = {"OpenCV": _opencv(1)}


def _cases() -> Iterator[Case]:
    photo = Image.open(io.BytesIO(photos.photo(4032, 3024, 1)))
    photo.load()
    yield from _jpegs(photo)
    yield from _pngs(photo)
    both: list[tuple[str, Size]] = [("", (1176, 868)), (" to 1000x750", (1000, 750))]
    webp = _encode(photo, "WEBP", quality=82)
    for name, target in both:
        more = {"libvips 1/3": _vips_shrunk(3, "webpload_buffer", scale=1 / 3)}
        candidates = _OURS | _PILLOW | _VIPS | _THUMBNAIL | more | _OPENCV
        yield Case(f"WebP photo, 12 MP{name}", webp, target, candidates)
    small = photo.resize((1600, 1200))
    every = _OURS | _PILLOW | _VIPS | _OPENCV
    yield Case("WebP photo, 2 MP", _encode(small, "WEBP", quality=82), (1176, 868), every)
    yield Case("GIF, 2 MP", _encode(small, "GIF"), (1176, 868), every)
    yield Case("AVIF photo, 12 MP", _encode(photo, "AVIF", quality=70, speed=9), *_to(every))
    yield Case("BMP photo, 12 MP", _encode(photo, "BMP"), *_to(_OURS | _PILLOW | _OPENCV))
    for coding in ("raw", "tiff_lzw"):
        data = _encode(photo, "TIFF", compression=coding)
        yield Case(f"TIFF photo ({coding}), 12 MP", data, *_to(every))
    import pillow_heif

    pillow_heif.register_heif_opener()
    yield Case(
        "HEIC photo, 2 MP", _encode(small, "HEIF", quality=70), *_to(_OURS | {"libheif": _heif})
    )


def _to(candidates: dict[str, Candidate]) -> tuple[Size, dict[str, Candidate]]:
    return (1176, 868), candidates


def _jpegs(photo: Image.Image) -> Iterator[Case]:
    import cv2

    more = {"Pillow draft": _drafted} | _VIPS | _THUMBNAIL | _OPENCV
    halved = more | {"OpenCV 1/2": _opencv(cv2.IMREAD_REDUCED_COLOR_2)}
    halved["libvips 1/2"] = _vips_shrunk(2, "jpegload_buffer", shrink=2)
    data = _encode(photo, "JPEG", quality=88)
    yield Case("JPEG photo, 12 MP", data, (1176, 868), _OURS | _PILLOW | halved)
    yield Case("JPEG photo, 12 MP to 1000x750", data, (1000, 750), _OURS | _PILLOW | halved)
    progressive = _encode(photo, "JPEG", quality=88, progressive=True)
    yield Case("progressive JPEG, 12 MP", progressive, (1176, 868), _OURS | _PILLOW | halved)
    for width, height in ((1600, 1200), (640, 480)):
        data = _encode(photo.resize((width, height)), "JPEG", quality=88)
        yield Case(f"JPEG photo, {width}x{height}", data, None, _OURS | _PILLOW | _VIPS | _OPENCV)


def _pngs(photo: Image.Image) -> Iterator[Case]:
    every = _OURS | _PILLOW | _VIPS | _OPENCV
    shrunk = {"libvips 1/3": _vips_shrunk(3, "pngload_buffer")}
    data = _encode(photo, "PNG")
    yield Case("PNG photo, 12 MP", data, (1176, 868), every | _THUMBNAIL | shrunk)
    yield Case("PNG photo, 12 MP to 1000x750", data, (1000, 750), every | _THUMBNAIL | shrunk)
    yield Case("PNG photo, 2 MP", _encode(photo.resize((1600, 1200)), "PNG"), (1176, 868), every)
    page = Image.open(io.BytesIO(photos.page(1275, 1650, 1)))
    kinds = {"RGB": page, "grey": page.convert("L"), "RGBA": page.convert("RGBA")}
    kinds |= {"16 colours": page.quantize(16), "1 bit": page.convert("1")}
    for kind, image in kinds.items():
        yield Case(f"PNG page, 1275x1650, {kind}", _encode(image, "PNG"), None, every)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------ measuring


def _timed(case: Case, repeats: int) -> Iterator[dict[str, Any]]:
    target = case.target or Image.open(io.BytesIO(case.data)).size
    whole = _finished(_loader(case.data, target), case.target).astype(np.float32)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in case.candidates}
    fidelity: dict[str, float | str] = {}
    for _ in range(repeats):
        for name, candidate in case.candidates.items():
            started, used = time.perf_counter(), time.process_time()
            done = _finished(candidate(case.data, target), case.target)
            runs[name].append((time.process_time() - used, time.perf_counter() - started))
            fidelity.setdefault(name, _psnr(done, whole))
    for name, run in runs.items():
        cpu, wall = (statistics.median(part) * 1e3 for part in zip(*run, strict=True))
        row = {"file": case.name, "decoder": name, "cpu_ms": round(cpu, 2)}
        yield row | {"wall_ms": round(wall, 2), "psnr_db": fidelity[name]}


def _psnr(done: Pixels, whole: NDArray[np.float32]) -> float | str:
    error = float(((done.astype(np.float32) - whole) ** 2).mean())
    return round(10 * np.log10(255**2 / error), 1) if error else "equal"


def _peaks() -> Iterator[dict[str, Any]]:
    """Peak memory with pictures of 100 megapixels, in MB above the memory before."""
    quarter = Image.open(io.BytesIO(photos.photo(_LARGE // 2, _LARGE // 2, 7)))
    photo = Image.new("RGB", (_LARGE, _LARGE))
    for at, turn in ((0, None), (1, 0), (2, 1), (3, 3)):
        part = quarter if turn is None else quarter.transpose(Image.Transpose(turn))
        photo.paste(part, (at % 2 * _LARGE // 2, at // 2 * _LARGE // 2))
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "JPEG": ("JPEG", {"quality": 88}),
        "progressive JPEG": ("JPEG", {"quality": 88, "progressive": True}),
        "PNG": ("PNG", {"compress_level": 3}),
        "WebP": ("WEBP", {"quality": 82, "method": 0}),
        "TIFF (LZW)": ("TIFF", {"compression": "tiff_lzw"}),
    }
    for name, (kind, options) in kinds.items():
        data = _encode(photo, kind, **options)
        for decoder, candidate in (_OURS | _PILLOW).items():
            yield {"file": f"{name}, 100 MP to 1000x1000", "decoder": decoder} | _peak(
                candidate, data
            )


def _peak(candidate: Candidate, data: bytes) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_measure_peak, args=(theirs, candidate, data)
    )
    child.start()
    seen: dict[str, Any] = ours.recv()
    child.join()
    return seen


def _measure_peak(connection: Any, candidate: Candidate, data: bytes) -> None:
    keep_freed_memory(192 << 20)
    vars(Image)["core"].set_blocks_max(8)
    Image.MAX_IMAGE_PIXELS = None
    candidate(_encode(Image.new("RGB", (64, 64)), "PNG"), (64, 64))  # loads the compiled loops
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _memory("VmRSS"), time.perf_counter()
    with contextlib.suppress(MemoryError):
        picture = candidate(data, (1000, 1000))
    took, size = time.perf_counter() - started, picture.size
    peak = _memory("VmHWM") - before
    connection.send(
        {"peak_mb": round(peak / 1e3), "decoded_at": f"{size[0]}x{size[1]}", "s": round(took, 2)}
    )


def _memory(name: str) -> int:
    """In KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{os.getpid()}/status").read_text())
    assert found is not None
    return int(found[1])


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()

"""The flags of `saccade plan`: a request and a machine."""

import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from server.imaging.sizing import Size
from server.planner.gpus import GPUS, Gpu

_MOST_IMAGES = 1000
_MOST_SIDE = 1 << 16
_MOST_TOKENS = 1 << 24


def add_flags(parser: Any) -> None:
    """Add the flags of `saccade plan` that `saccade serve` does not have."""
    flags = parser.add_argument_group("Plan", "The request, and the machine.")
    flags.add_argument(
        "--gpu", required=True, type=_gpu, metavar="NAME", help=f"One of {', '.join(GPUS)}."
    )
    flags.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="Memory of the GPU, in GiB, if it differs."
    )
    flags.add_argument(
        "--image",
        action="append",
        type=_size,
        metavar="WxH",
        help="An image of this size, in pixels; may be given several times.",
    )
    flags.add_argument(
        "--images", type=_count(1, _MOST_IMAGES), metavar="N", help="So many such images."
    )
    flags.add_argument(
        "--prompt",
        type=_count(1, _MOST_TOKENS),
        default=500,
        metavar="TOKENS",
        help="Text of the prompt (default: 500 tokens).",
    )
    flags.add_argument(
        "--output",
        type=_count(1, _MOST_TOKENS),
        default=200,
        metavar="TOKENS",
        help="Length of the answer (default: 200 tokens).",
    )
    flags.add_argument(
        "--image-budget",
        type=_count(1, _MOST_TOKENS),
        metavar="TOKENS",
        help="The request's max_image_tokens.",
    )
    flags.add_argument(
        "--tp",
        dest="tensor_parallel_size",
        type=_count(1, 1024),
        metavar="N",
        help="As --tensor-parallel-size.",
    )
    flags.add_argument("--price", type=_positive, help="Of one GPU for an hour, in any currency.")
    flags.add_argument(
        "--uplink-mbit",
        type=_positive,
        default=1000.0,
        metavar="MBIT",
        help="At which a client sends images, in Mbit/s (default: 1000).",
    )
    flags.add_argument("--json", action="store_true", help="Print JSON.")
    flags.add_argument(
        "--plot", type=Path, metavar="FILE", help="Draw the variants into a PNG, SVG or PDF file."
    )


def _gpu(text: str) -> Gpu:
    name = text.lower().replace("_", "-")
    if name not in GPUS:
        raise ArgumentTypeError(f"unknown GPU {text!r}; known are {', '.join(GPUS)}")
    return GPUS[name]


def _size(text: str) -> Size:
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(1 <= side <= _MOST_SIDE for side in size):
        raise ArgumentTypeError(f"{text!r} is not a size in pixels such as 1920x1080")
    return size


def _count(least: int, most: int) -> Any:
    def parse_count(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise ArgumentTypeError(f"must be {least} to {most}")
        return int(text)

    return parse_count


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise ArgumentTypeError("must be a number above 0")
    return value

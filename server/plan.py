"""`saccade plan`: what a model costs on a GPU, from its configuration alone; see `docs/plan.md`."""

import json
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.engine.arguments import parse
from server.errors import CannotPlan, ClientError
from server.imaging.sizing import Size
from server.imaging.tokens import TokenRule, allocate_together
from server.planner import report
from server.planner.gpus import GPUS, Gpu
from server.planner.plan import Machine, Plan, PlannedImage, Workload, plan, with_fp8
from server.planner.shape import ModelShape
from server.settings import Settings

_GIB = 1 << 30
# vLLM's defaults follow the memory of the GPU: (at least bytes, --max-num-batched-tokens,
# --max-num-seqs); see `EngineArgs.get_batch_defaults` there.
_BATCH_DEFAULTS = ((160 * _GIB, 16384, 1024), (70 * _GIB, 8192, 1024), (0, 2048, 256))
# Shares of the image tokens for which variants are computed.
_SHARES = (1, 2, 4)
_MOST_IMAGES = 1000
_MOST_SIDE = 1 << 16


def run(argv: Sequence[str]) -> None:
    """Print the plan that the command line asks for.

    Raises:
        CannotPlan: the model cannot be built here, takes no pictures, or not such ones.
        OSError: a file cannot be read or written.
    """
    args, settings = parse(argv, "plan", _add_flags)
    # Late: it imports the classes of models.
    from server.engine.model_shape import read

    shape, make_rule = read(args)
    variants = plans(shape, make_rule() if args.image else None, args, settings)
    if args.json:
        print(json.dumps(report.as_json(shape, variants), indent=2))
    else:
        print(report.as_text(shape, variants))
    if args.plot:
        from server.planner.plot import draw

        title = f"{args.model} on {args.tensor_parallel_size} x {args.gpu.name}"
        draw(title, [each for name, each in variants if "FP8" not in name], args.plot)


def plans(
    shape: ModelShape, rule: TokenRule | None, args: Namespace, settings: Settings
) -> list[tuple[str, Plan]]:
    """The plan of the request that `args` describe, and of variants with a lower budget of image
    tokens and with a KV cache of 8 bits.

    Raises:
        CannotPlan: see `run`.
    """
    sizes = _sizes(args)
    if sizes and rule is None:
        raise CannotPlan("this model takes no pictures")
    machine = _machine(args)
    workload = _workload(rule, sizes, args, settings, args.image_budget)
    _check_length(workload, shape)
    asked = "as asked"
    found = [(asked, plan(shape, workload, machine))]
    fp8 = with_fp8(shape)
    if str(args.kv_cache_dtype).startswith("fp8"):
        if fp8 is None:
            raise CannotPlan("the size of this model's KV cache in 8 bits is not known")
        shape, fp8 = fp8, None
        found = [(asked, plan(shape, workload, machine))]
    if fp8:
        found.append(("KV cache in FP8", plan(fp8, workload, machine)))
    for share in _SHARES[1:] if sizes else ():
        budget = workload.image_tokens // share
        try:
            capped = _workload(rule, sizes, args, settings, budget)
        except CannotPlan:
            break
        found.append((f"max_image_tokens {budget}", plan(shape, capped, machine)))
        if fp8:
            found.append((f"max_image_tokens {budget}, FP8", plan(fp8, capped, machine)))
    return found


def _check_length(workload: Workload, shape: ModelShape) -> None:
    if workload.tokens > shape.max_model_len:
        raise CannotPlan(
            f"the request has {workload.tokens:,} tokens, and the model takes "
            f"{shape.max_model_len:,} (--max-model-len)"
        )


def _workload(
    rule: TokenRule | None,
    sizes: Sequence[Size],
    args: Namespace,
    settings: Settings,
    budget: int | None,
) -> Workload:
    images: list[PlannedImage] = []
    if rule is not None and sizes:
        caps = [settings.images.max_image_tokens] * len(sizes)
        try:
            allocations = allocate_together(rule, sizes, budget, caps)
        except ClientError as error:
            raise CannotPlan(str(error)) from error
        for size, allocation in zip(sizes, allocations, strict=True):
            views = tuple(
                view.size for view in rule.views(*size, allocation) if view.kind != "joined"
            )
            views = views or (allocation.processed,)
            images.append(PlannedImage(size, allocation.tokens, allocation.prompt_tokens, views))
    return Workload(tuple(images), args.prompt, args.output)


def _sizes(args: Namespace) -> list[Size]:
    sizes: list[Size] = args.image or []
    if args.images is not None:
        if len(sizes) != 1:
            raise CannotPlan("--images needs exactly one --image, whose size they all have")
        sizes = sizes * args.images
    return sizes


def _machine(args: Namespace) -> Machine:
    gpu: Gpu = args.gpu
    if args.gpu_memory is not None:
        gpu = replace(gpu, memory=int(args.gpu_memory * _GIB))
    small = _BATCH_DEFAULTS[-1]
    defaults = next(row for row in _BATCH_DEFAULTS if gpu.memory >= row[0])
    if gpu.name.startswith("a100"):
        defaults = small
    seqs = args.max_num_seqs or defaults[2]
    return Machine(
        gpu,
        args.tensor_parallel_size,
        args.gpu_memory_utilization,
        seqs,
        args.max_num_batched_tokens or max(defaults[1], seqs),
        args.kv_cache_memory_bytes,
        args.uplink_mbit * 1e6 / 8,
        args.price,
    )


# ---------------------------------------------------------------------- flags


def _add_flags(parser: Any) -> None:
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
        type=_count(1, 1 << 24),
        default=500,
        metavar="TOKENS",
        help="Text of the prompt (default: 500 tokens).",
    )
    flags.add_argument(
        "--output",
        type=_count(1, 1 << 24),
        default=200,
        metavar="TOKENS",
        help="Length of the answer (default: 200 tokens).",
    )
    flags.add_argument(
        "--image-budget",
        type=_count(1, 1 << 24),
        metavar="TOKENS",
        help="The request's max_image_tokens.",
    )
    flags.add_argument(
        "--tp", dest="tensor_parallel_size", type=_count(1, 1024), help="As --tensor-parallel-size."
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

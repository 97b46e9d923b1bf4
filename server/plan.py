"""`saccade plan`: what a model costs on a GPU, from its configuration alone; see `docs/plan.md`."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from server.engine.arguments import parse
from server.errors import CannotPlan, ClientError
from server.imaging.sizing import Size
from server.imaging.tokens import TokenRule, allocate_together
from server.planner import report
from server.planner.flags import add_flags
from server.planner.gpus import Gpu
from server.planner.plan import Machine, Plan, PlannedImage, Workload, plan, with_fp8
from server.planner.shape import ModelShape
from server.settings import Settings

_GIB = 1 << 30
# vLLM's defaults follow the memory of the GPU: (at least bytes, --max-num-batched-tokens,
# --max-num-seqs); see `EngineArgs.get_batch_defaults` there.
_BATCH_DEFAULTS = ((160 * _GIB, 16384, 1024), (70 * _GIB, 8192, 1024), (0, 2048, 256))
# Shares of the image tokens for which variants are computed.
_SHARES = (1, 2, 4)


def run(argv: Sequence[str]) -> None:
    """Print the plan that the command line asks for.

    Raises:
        CannotPlan: the model cannot be built here, takes no pictures, or not such ones.
        OSError: a file cannot be read or written.
    """
    args, settings = parse(argv, "plan", add_flags)
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
    fp8 = with_fp8(shape)
    if str(args.kv_cache_dtype).startswith("fp8"):
        if fp8 is None:
            raise CannotPlan("the size of this model's KV cache in 8 bits is not known")
        shape, fp8 = fp8, None
    found = [("as asked", plan(shape, workload, machine))]
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

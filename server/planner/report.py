"""A plan as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from server.planner.plan import Plan
from server.planner.shape import ModelShape

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def as_json(shape: ModelShape, variants: Sequence[tuple[str, Plan]]) -> dict[str, Any]:
    """All numbers of the plan and of its variants. Bytes, seconds and FLOPs, without prefixes."""
    return {
        "model": {
            "architecture": shape.name,
            "max_model_len": shape.max_model_len,
            "weight_bytes": shape.weight_bytes,
            "language_weight_bytes": shape.language.weight_bytes,
            "encoder_weight_bytes": shape.encoder.weight_bytes if shape.encoder else 0,
        },
        "plans": [{"name": name, **_plan(plan)} for name, plan in variants],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan),
        "prompt_tokens": plan.workload.prompt_tokens,
        "image_tokens": plan.workload.image_tokens,
        "tokens": plan.workload.tokens,
        "ttft_s": plan.ttft.total,
    }


def as_text(shape: ModelShape, variants: Sequence[tuple[str, Plan]]) -> str:
    """A table for each part of the first plan, and one that compares all."""
    plan = variants[0][1]
    parts = [_tokens(plan), _memory(shape, plan), _times(plan), _rates(plan)]
    if len(variants) > 1:
        parts.append(_comparison(variants))
    machine = plan.machine
    title = f"{shape.name} on {machine.gpus} x {machine.gpu.name}"
    return "\n\n".join([title, *parts, _EXPLANATION])


_EXPLANATION = (
    "Tokens, weights and bytes of KV cache are exact; activations, times and rates are estimates."
)


def _tokens(plan: Plan) -> str:
    rows = [
        (
            f"image {number}, {image.size[0]}x{image.size[1]}",
            f"{image.prompt_tokens:,} tokens",
            "" if len(image.views) == 1 else f"{len(image.views)} views",
        )
        for number, image in enumerate(plan.workload.images, 1)
    ]
    work = plan.workload
    rows.append(("text of the prompt", f"{work.prompt:,} tokens", ""))
    rows.append(("answer", f"{work.output:,} tokens", ""))
    rows.append(("request", f"{work.tokens:,} tokens", f"prompt {work.prompt_tokens:,}"))
    return _table("Tokens", rows)


def _memory(shape: ModelShape, plan: Plan) -> str:
    memory, encoder = plan.memory, shape.encoder
    of_encoder = f"encoder {_bytes(encoder.weight_bytes)} of all" if encoder else ""
    allowed = f"{plan.machine.utilization:.0%} of {_bytes(memory.total)}"
    rows = [
        ("for vLLM", _bytes(memory.allowed), allowed),
        ("weights", _bytes(memory.weights), of_encoder),
        ("activations, at most", _bytes(memory.activations), "estimate"),
        ("libraries and graphs", _bytes(memory.overhead), "estimate"),
        (
            "KV cache",
            _bytes(memory.kv_cache),
            "given" if plan.machine.kv_cache_bytes else "the rest",
        ),
        ("  of a token", _bytes(plan.kv_bytes_per_token), ""),
        ("  of a request", _bytes(plan.kv_bytes_per_request), ""),
    ]
    if plan.workload.images:
        rows.append(("  of an image", _bytes(plan.kv_bytes_per_image), "the largest one"))
    fits = f"{plan.concurrency:,.2f}"
    rows.append(("requests at once", fits, "by the KV cache" if plan.fits else "does not fit"))
    return _table("Memory of each GPU", rows)


def _times(plan: Plan) -> str:
    times = plan.ttft
    uplink = plan.machine.uplink * 8 / 1e6
    rows = [
        ("upload", _seconds(times.upload), f"at {uplink:,.0f} Mbit/s"),
        ("decode and preprocess", _seconds(times.preprocess), "a core for each image"),
        ("encode", _seconds(times.encode), f"{plan.encoder_flops / 1e12:,.2f} TFLOP"),
        ("prefill", _seconds(times.prefill), ""),
        ("time to first token", _seconds(times.total), "on an idle server"),
    ]
    return _table("One request", rows)


def _rates(plan: Plan) -> str:
    if not plan.fits:
        return "No such request fits into the KV cache."
    rows = [
        ("running requests", f"{plan.running:,}", f"a token each in {_seconds(plan.step_s)}"),
        ("requests/s", f"{plan.requests_per_s:,.2f}", ""),
        ("images/s", f"{plan.images_per_s:,.2f}", ""),
        ("tokens of answers/s", f"{plan.tokens_per_s:,.0f}", ""),
        ("cores for images", f"{plan.cpu_cores:,.2f}", "they decode at that rate"),
    ]
    if plan.cost_per_1000_images is not None:
        rows.append(("1,000 images", f"{plan.cost_per_1000_images:,.3f}", "at the given price"))
    return _table("At full load", rows)


def _comparison(variants: Sequence[tuple[str, Plan]]) -> str:
    head = ("", "image tokens", "at once", "TTFT", "images/s")
    rows = [
        (
            name,
            f"{plan.workload.image_tokens:,}",
            f"{plan.concurrency:,.1f}",
            _seconds(plan.ttft.total),
            f"{plan.images_per_s:,.2f}",
        )
        for name, plan in variants
    ]
    return _table("What would change", [head, *rows])


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed; all but the first and, of three, the last are numbers."""
    columns = len(rows[0])
    widths = [max(len(row[column]) for row in rows) for column in range(columns)]
    lines = [title]
    for row in rows:
        cells = [f"  {row[0]:<{widths[0]}}"]
        for column in range(1, columns):
            is_note = columns == 3 and column == 2
            text = row[column]
            cells.append(text if is_note else f"{text:>{widths[column]}}")
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _bytes(count: float) -> str:
    sign, size = "-" if count < 0 else "", abs(count)
    for unit in _BINARY:
        if size < 1024 or unit == _BINARY[-1]:
            break
        size /= 1024
    return f"{sign}{size:,.0f} {unit}" if unit == "B" else f"{sign}{size:,.2f} {unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"

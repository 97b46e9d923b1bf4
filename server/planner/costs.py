"""From the shape of a model to operations, bytes and seconds.

A multiplication with its addition counts as two operations (2 FLOPs). Attention of a query over n
positions takes 4 n width FLOPs in each layer: 2 for the scores and 2 for the sum of values.

Times are the operations or bytes of a step, divided by the share of a GPU's peak that such a step
reaches. The shares are fitted to AIConfigurator 0.12's figures for Qwen3-VL-8B on H100, H200, L40S
and B200 (`tests/unit/test_planner.py` has them, and how near these formulas come).
"""

import itertools
from collections.abc import Sequence

from server.imaging.sizing import Size
from server.planner.gpus import Gpu
from server.planner.shape import Attention, Encoder, Language

# Shares of the peak that are reached.
_PREFILL_SHARE, _ENCODER_SHARE, _READ_SHARE = 0.62, 0.45, 0.88
# Time that a step takes beside its work: launches of kernels, scheduling, sampling.
_STEP_S = 0.001


def encoder_flops(encoder: Encoder, views: Sequence[Size], tokens: int) -> float:
    """Operations to encode one picture of which the encoder sees `views`, (width, height) in
    pixels, and which becomes `tokens` tokens."""
    flops = 2.0 * encoder.macs_per_token * tokens
    for view in views:
        patches = patches_of(encoder, view)
        flops += 2.0 * encoder.macs_per_patch * patches
        flops += sum(_attention(layers, patches, patches) for layers in encoder.attention)
    return flops


def patches_of(encoder: Encoder, view: Size) -> int:
    """Patches of a picture of (width, height) pixels."""
    return -(-view[0] // encoder.patch) * -(-view[1] // encoder.patch)


def _attention(layers: Attention, queries: int, positions: float) -> float:
    seen = positions if layers.window is None else min(positions, layers.window)
    return 4.0 * layers.layers * layers.width * queries * seen


def encode_s(gpu: Gpu, flops: float) -> float:
    """Seconds to encode pictures that take `flops` operations."""
    return flops / (_ENCODER_SHARE * gpu.flops) + _STEP_S


def prefill_flops(language: Language, tokens: int) -> float:
    """Operations for a prompt of `tokens` tokens: each attends to those before it."""
    attention = sum(_attention(layers, tokens, tokens / 2) for layers in language.attention)
    return 2.0 * language.macs_per_token * tokens + 2.0 * language.macs_per_output + attention


def prefill_s(gpu: Gpu, language: Language, tokens: int, gpus: int = 1) -> float:
    """Seconds for a prompt on a tensor-parallel group; the weights are read once at least."""
    compute = prefill_flops(language, tokens) / (_PREFILL_SHARE * gpu.flops * gpus)
    read = _read_bytes(language, tokens) / (_READ_SHARE * gpu.bandwidth * gpus)
    return max(compute, read) + _STEP_S


def decode_step_s(
    gpu: Gpu, language: Language, batch: int, kv_bytes: float, gpus: int = 1
) -> float:
    """Seconds to make one token for each of `batch` requests, whose KV caches are `kv_bytes` on
    each GPU together. Reads all weights and caches once, unless the products take longer."""
    read = _read_bytes(language, batch) / gpus + kv_bytes
    compute = 2.0 * (language.macs_per_token + language.macs_per_output) * batch / gpus
    return (
        max(read / (_READ_SHARE * gpu.bandwidth), compute / (_PREFILL_SHARE * gpu.flops)) + _STEP_S
    )


def _read_bytes(language: Language, tokens: int) -> float:
    """Bytes of weights that a step of `tokens` tokens reads: of a mixture's experts, those that at
    least one token chooses, if each token chooses evenly."""
    read = float(language.weight_bytes - language.unread_bytes)
    if experts := language.experts:
        unread = (1 - experts.chosen / experts.count) ** tokens
        read -= experts.weight_bytes * unread
    return read


def activation_bytes(language: Language, tokens: int, outputs: int, gpus: int = 1) -> int:
    """Peak of a step of `tokens` tokens of which `outputs` are sampled: states and their residual,
    a feed-forward layer's two inputs, queries, keys and values; or the logits, in 16 and 32 bits.
    An estimate: what is freed when depends on kernels and compilation."""
    widest = max((layers.width for layers in language.attention), default=0)
    states = 4 * language.hidden + (2 * language.intermediate + 3 * widest) // gpus
    logits = outputs * language.vocabulary * (language.itemsize + 4)
    return max(tokens * states * language.itemsize, logits)


def encoder_activation_bytes(encoder: Encoder, patches: int, itemsize: int) -> int:
    """Peak of the encoder over `patches` patches at once: states and their residual, queries, keys
    and values, a feed-forward layer. An estimate, as `activation_bytes`."""
    return patches * (6 * encoder.hidden + 2 * encoder.intermediate) * itemsize


# ---------------------------------------------------------------------- the front end

# Milliseconds of one core for a JPEG of so many megapixels, from bytes to features: measured by
# `benchmarks.serve` on a Xeon with two cores (docs/performance.md).
_PICTURE_MS = ((0.05, 1.2), (2.07, 6.2), (12.2, 15.8))
_JPEG_BYTES_PER_PIXEL = 0.25


def picture_bytes(size: Size) -> float:
    """Bytes of a photo of (width, height) as a JPEG of usual quality."""
    return _JPEG_BYTES_PER_PIXEL * size[0] * size[1]


def picture_cpu_s(size: Size) -> float:
    """Seconds of a core for decoding and preprocessing a JPEG of (width, height)."""
    pixels = size[0] * size[1] / 1e6
    points = _PICTURE_MS
    for (low, low_ms), (high, high_ms) in itertools.pairwise(points):
        if pixels <= high or high == points[-1][0]:
            share = max(pixels - low, 0.0) / (high - low)
            return (low_ms + share * (high_ms - low_ms)) / 1e3
    raise AssertionError

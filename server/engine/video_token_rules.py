"""The rule of a model for the tokens of videos, from its multimodal processor in vLLM.

vLLM's processor class determines the rule, as for pictures (`token_rules.py`). A rule is only used
if it agrees with the processor on a few test videos.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.multimodal.processing import cached_encode

from server.engine.extractor import resized
from server.engine.vllm_adapter import processors
from server.errors import InvalidVideo
from server.imaging.sizing import Size
from server.imaging.tokens.rule import Count
from server.imaging.tokens.video import (
    FrameTokens,
    MeasuredVideoTokens,
    QwenVideoTokens,
    VideoRule,
)

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor

log = logging.getLogger("saccade.images")

Options = Mapping[str, Any]
# Frames, width and height of the test videos.
_CHECKED = ((2, 347, 251), (5, 130, 90), (4, 61, 59))
# Options with which the processor itself chooses frames.
_SAMPLING = frozenset({"fps", "num_frames", "do_sample_frames", "min_frames", "max_frames"})


def video_rule(
    processor: "BaseMultiModalProcessor[Any]", options: Options
) -> QwenVideoTokens | FrameTokens | None:
    """The rule for requests with `options` (`mm_processor_kwargs`); None if the family is unknown
    or the processor differs from its family. Runs the processor about twelve times."""
    builder = _BUILDERS.get((type(processor.info).__name__, type(processor).__name__))
    config = processor.info.ctx.get_mm_config()
    nested = dict(options.get("videos_kwargs") or {})
    if builder is None or _SAMPLING & {*options, *nested}:
        return None
    if config.get_video_pruning_spec() is not None:
        return None
    try:
        rule = builder(processor, options)
        if rule is None:
            return None
        rule = replace(rule, alike=_resizes_alike(rule, processor, options))
        if _agrees(rule, processor, options):
            return rule
    except Exception:  # a configuration that the family's rule does not support
        log.exception("failed to compute the video tokens of %s", type(processor).__name__)
        return None
    log.warning("the video token rule does not match %s", type(processor).__name__)
    return None


def measured_video_rule(
    processor: "BaseMultiModalProcessor[Any]", options: Options
) -> MeasuredVideoTokens:
    """The rule for other families: it measures the tokens of each video."""

    def measured(frames: int, width: int, height: int) -> Count:
        try:
            return count(processor, frames, (width, height), options)
        except ValueError as error:
            raise InvalidVideo(
                f"the model does not accept a video of {frames} frames of {width}x{height} pixels"
            ) from error

    return MeasuredVideoTokens(measured)


def count(
    processor: "BaseMultiModalProcessor[Any]", frames: int, size: Size, options: Options
) -> Count:
    """Count the tokens of a black video by running the processor. Its frames are a second apart."""
    blank = processors.blank_frames(frames, size)
    metadata = metadata_of(range(frames))
    outputs, _ = processors.video_processed(
        processor, np.ascontiguousarray(blank), metadata, options
    )
    _, updates = processors.video_item(processor, outputs, blank, metadata, options)
    content = updates[0].content
    length = len(content.full)
    tokens = length if content.is_embed is None else int(content.is_embed(content.full).sum())
    return Count(tokens, length)


def metadata_of(indices: range) -> dict[str, Any]:
    """What a loader would tell of these frames of a video of one frame per second."""
    total = indices[-1] + 1
    return {
        "total_num_frames": total,
        "fps": 1.0,
        "duration": float(total),
        "video_backend": "opencv",
        "frames_indices": list(indices),
        "do_sample_frames": False,
    }


def _agrees(rule: VideoRule, processor: Any, options: Options) -> bool:
    for frames, width, height in _CHECKED:
        natural = rule.allocate(frames, width, height)
        fewest = rule.fewest(frames, width, height)
        for cap in (None, (natural.tokens + fewest) // 2):
            got = rule.allocate(frames, width, height, cap)
            size = got.resize or (width, height)
            counted = count(processor, got.frames, size, {**options, **got.options})
            times = [float(start) for start in range(got.frames)]
            if counted != (got.tokens, rule.prompt_tokens(got, times)):
                return False
    return True


def _resizes_alike(rule: QwenVideoTokens | FrameTokens, processor: Any, options: Options) -> bool:
    """Whether the processor makes the same of frames that were resized to their target before."""
    random = np.random.default_rng(0)
    for frames, width, height in _CHECKED[:2]:
        noise = random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        target = rule.allocate(frames, width, height).processed
        before = np.stack([resized(frame, target) for frame in noise])
        theirs, ours = (_features(processor, each, options) for each in (noise, before))
        if theirs.keys() != ours.keys():
            return False
        if not all(torch.equal(theirs[name], ours[name]) for name in theirs):
            return False
    return True


def _features(
    processor: Any, frames: npt.NDArray[np.uint8], options: Options
) -> dict[str, torch.Tensor]:
    metadata = metadata_of(range(len(frames)))
    outputs, fields = processors.video_processed(processor, frames, metadata, options)
    found: dict[str, torch.Tensor] = {}
    for name in fields:
        value = outputs.get(name)
        tensors = value if isinstance(value, list) else [value]
        for index, each in enumerate(tensors):
            if isinstance(each, torch.Tensor):
                found[f"{name}.{index}"] = each
    return found


# ---------------------------------------------------------------------- one builder per family


def _qwen(processor: Any, options: Options) -> QwenVideoTokens | None:
    return _qwen_rule(processor, options, together=False)


def _qwen3(processor: Any, options: Options) -> QwenVideoTokens | None:
    rule = _qwen_rule(processor, options, together=True)
    tokenizer = processor.info.get_tokenizer()

    @functools.lru_cache(4096)
    def time_tokens(second: float) -> int:
        return len(tokenizer.encode(f"<{second:.1f} seconds>", add_special_tokens=False))

    return None if rule is None else replace(rule, time_tokens=time_tokens)


def _qwen_rule(processor: Any, options: Options, *, together: bool) -> QwenVideoTokens | None:
    videos = processor.info.get_hf_processor().video_processor
    if videos.cap_pixels_per_frame or videos.temporal_patch_size != 2:
        return None
    size = processors.qwen_video_pixels(processor.info, options)
    factor = videos.patch_size * videos.merge_size
    fewest, most = size["shortest_edge"], size["longest_edge"]
    return QwenVideoTokens(factor, fewest, most, videos.merge_size, together)


def _llava_onevision(processor: Any, options: Options) -> FrameTokens:
    info = processor.info
    size = info.get_hf_processor().video_processor.size
    each = processors.llava_frame_tokens(info)
    return FrameTokens("llava_onevision", each, 1, (size["width"], size["height"]), lambda _: 0)


def _internvl(processor: Any, options: Options) -> FrameTokens:
    """InternVL in the Hugging Face format."""
    hf_processor = processor.info.get_hf_processor()
    size = hf_processor.video_processor.size
    tokenizer = processor.info.get_tokenizer()
    start, end = hf_processor.start_image_token, hf_processor.end_image_token

    @functools.lru_cache(1024)
    def text_tokens(frames: int) -> int:
        token = hf_processor.video_token
        text = "\n".join(f"Frame{index + 1}: {start}{token}{end}" for index in range(frames))
        return len(cached_encode(tokenizer, text, add_special_tokens=False)) - frames

    view = (size["width"], size["height"])
    return FrameTokens("internvl", hf_processor.image_seq_length, 0, view, text_tokens)


def _internvl_chat(processor: Any, options: Options) -> FrameTokens | None:
    """InternVL in the format of its authors, with vLLM's processor."""
    hf_processor = processor.info.get_hf_processor(**options)
    token = hf_processor.ctx_video_token
    if token is None:
        return None
    side = hf_processor.video_processor.image_size
    tokenizer = processor.info.get_tokenizer()
    start, end = hf_processor.start_image_token, hf_processor.end_image_token

    @functools.lru_cache(1024)
    def text_tokens(frames: int) -> int:
        text = "".join(f"Frame{index + 1}: {start}{token}{end}" for index in range(frames))
        return len(cached_encode(tokenizer, text, add_special_tokens=False)) - frames

    return FrameTokens("internvl", hf_processor.image_seq_length, 0, (side, side), text_tokens)


_Builder = Callable[[Any, Options], QwenVideoTokens | FrameTokens | None]
_QWEN3 = "Qwen3VLMultiModalProcessor"

# Keyed by names: importing vLLM's classes would load the modules of every family.
_BUILDERS: dict[tuple[str, str], _Builder] = {
    ("Qwen2VLProcessingInfo", "Qwen2VLMultiModalProcessor"): _qwen,
    ("Qwen2_5_VLProcessingInfo", "Qwen2_5_VLMultiModalProcessor"): _qwen,
    ("Qwen3VLProcessingInfo", _QWEN3): _qwen3,
    ("Qwen3VLMoeProcessingInfo", _QWEN3): _qwen3,
    ("Qwen3_5ProcessingInfo", _QWEN3): _qwen3,
    ("Qwen3_5MoeProcessingInfo", _QWEN3): _qwen3,
    ("LlavaOnevisionProcessingInfo", "LlavaOnevisionMultiModalProcessor"): _llava_onevision,
    ("InternS1ProcessingInfo", "InternS1MultiModalProcessor"): _internvl,
    ("InternVLProcessingInfo", "InternVLMultiModalProcessor"): _internvl_chat,
}

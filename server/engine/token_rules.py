"""The token rule of a model, from its multimodal processor in vLLM.

vLLM's processor class determines the rule; its numbers come from the processor under the options of
server and request. A rule is only used if it agrees with the processor on a few test pictures.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm.multimodal.processing import cached_encode

from server.engine.vllm_adapter import processors
from server.errors import ImageAspectRatio, InvalidImage
from server.imaging import sizing
from server.imaging.tokens.anyres import AnyResTokens
from server.imaging.tokens.native import PixtralTokens, QwenTokens
from server.imaging.tokens.rule import Count, MeasuredTokens, TokenRule
from server.imaging.tokens.tiles import IdeficsTokens, InternVLTokens
from server.imaging.tokens.views import FixedTokens, GemmaTokens, PanAndScan

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor

log = logging.getLogger("saccade.images")

Options = Mapping[str, Any]
# Sizes at which a rule must agree with the processor; none is a round number for any family.
_CHECK_SIZES = ((347, 251), (130, 411), (61, 59), (790, 160))


def token_rule(processor: "BaseMultiModalProcessor[Any]", options: Options) -> TokenRule | None:
    """The rule for requests with `options` (`mm_processor_kwargs`); None if the family is unknown
    or the processor differs from its family. Runs the processor about ten times."""
    builder = builder_of(type(processor.info), type(processor))
    if builder is None:
        return None
    try:
        rule = builder(processor, options)
        if rule is not None and _agrees(rule, processor, options):
            return rule
    except Exception:  # a configuration that the family's rule does not support
        log.exception("failed to compute the image tokens of %s", type(processor).__name__)
        return None
    log.warning("the image token rule does not match %s", type(processor).__name__)
    return None


def builder_of(info: type, processor: type) -> "_Builder | None":
    """What makes the rule of a family, by vLLM's classes; None if the family is unknown."""
    return _BUILDERS.get((info.__name__, processor.__name__))


def measured_rule(
    processor: "BaseMultiModalProcessor[Any]", options: Options, copies: int = 1
) -> MeasuredTokens:
    """The rule for other families: it measures the tokens of each size. `copies`: for a picture
    that is one of so many in a prompt."""

    def measured(width: int, height: int) -> Count:
        try:
            return count(processor, width, height, options, copies)
        except ValueError as error:
            raise InvalidImage(
                f"the model does not accept an image of {width}x{height} pixels"
            ) from error

    return MeasuredTokens(measured)


def count(
    processor: "BaseMultiModalProcessor[Any]",
    width: int,
    height: int,
    options: Options,
    copies: int = 1,
) -> Count:
    """Count the tokens of a blank picture by running the processor. `copies`: of one of so many
    equal ones."""
    image = Image.new("RGB", (width, height))
    outputs, _ = processors.processed(processor, image, options, copies)
    _, updates = processors.item(processor, outputs, image, options, copies)
    content = updates[0].content
    length = len(content.full)
    tokens = length if content.is_embed is None else int(content.is_embed(content.full).sum())
    return Count(tokens, length)


def _agrees(rule: TokenRule, processor: "BaseMultiModalProcessor[Any]", options: Options) -> bool:
    for width, height in _CHECK_SIZES:
        try:
            allocation = rule.allocate(width, height)
            fewest = rule.fewest(width, height)
            capped = rule.allocate(width, height, (allocation.tokens + fewest) // 2)
        except ImageAspectRatio:
            continue
        for allocated in (allocation, capped):
            size = allocated.resize or (width, height)
            counted = count(processor, *size, {**options, **allocated.options})
            if counted != (allocated.tokens, allocated.prompt_tokens):
                return False
    return True


# ---------------------------------------------------------------------- one builder per family


def _qwen(processor: Any, options: Options) -> TokenRule:
    info = processor.info
    size, image_processor = processors.qwen_pixels(info, options), info.get_image_processor()
    factor = image_processor.patch_size * image_processor.merge_size
    return QwenTokens(sizing.NativeResolution(factor, size["shortest_edge"], size["longest_edge"]))


def _pixtral(processor: Any, options: Options) -> TokenRule:
    encoder = processor.info.get_vision_encoder_info()
    return PixtralTokens(encoder.get_patch_size(), encoder.get_image_size())


def _mistral_format(processor: Any, options: Options) -> TokenRule:
    """Pixtral and Mistral 3 in Mistral's format."""
    config = processor.info.get_image_processor().mm_encoder.image_config
    patch = config.image_patch_size * config.spatial_merge_size
    return PixtralTokens(patch, config.max_image_size, rounds_down=False)


def _mistral3(processor: Any, options: Options) -> TokenRule:
    encoder = processor.info.get_vision_encoder_info(options)
    return PixtralTokens(encoder.get_patch_size(), encoder.get_image_size())


def _fixed(processor: Any, options: Options) -> TokenRule | None:
    settings = _Settings(processor, options)
    size, edge = settings.size("size"), None
    if set(size) == {"shortest_edge"} and settings["do_center_crop"]:
        size, edge = settings.size("crop_size"), size["shortest_edge"]
    if "height" not in size:
        return None
    view = _view(size)
    family = processor.info.get_hf_config().model_type
    return FixedTokens(family, *count(processor, *view, options), view, edge)


def _llava_next(processor: Any, options: Options) -> TokenRule | None:
    return _anyres("llava_next", processor, options, shrinks=False)


def _llava_onevision(processor: Any, options: Options) -> TokenRule | None:
    return _anyres("llava_onevision", processor, options, shrinks=True)


def _anyres(family: str, processor: Any, options: Options, *, shrinks: bool) -> TokenRule | None:
    from vllm.model_executor.models.vision import get_num_selected_vision_tokens

    config, encoder = processor.info.get_hf_config(), processor.info.get_vision_encoder_info()
    grids = sizing.grids(config.image_grid_pinpoints)
    if sizing.grids(_Settings(processor, options)["image_grid_pinpoints"]) != grids:
        return None  # the model packs the features for the grids of its configuration
    tile = encoder.get_image_size()
    base = get_num_selected_vision_tokens(
        encoder.get_num_image_tokens(image_width=tile, image_height=tile),
        config.vision_feature_select_strategy,
    )
    rule = sizing.BestGrid(grids)
    return AnyResTokens(family, rule, tile, encoder.get_patch_grid_length(), base, shrinks)


def _internvl(processor: Any, options: Options) -> TokenRule:
    """InternVL in the Hugging Face format."""
    settings = _Settings(processor, options)
    if not settings["crop_to_patches"]:
        return _one_view("internvl", processor, options, settings.size("size"))
    return InternVLTokens(
        tile=_view(settings.size("size")),
        tokens_per_tile=processor.info.get_hf_processor().image_seq_length,
        least_tiles=settings["min_patches"],
        most_tiles=settings["max_patches"],
        thumbnail=True,
        option="max_patches",
    )


def _internvl_chat(processor: Any, options: Options) -> TokenRule | None:
    """InternVL in the format of its authors, with vLLM's processor."""
    hf_processor = processor.info.get_hf_processor(**options)
    images = hf_processor.image_processor
    if not images.dynamic_image_size:
        side = images.image_size
        return _one_view("internvl", processor, options, {"width": side, "height": side})
    if images.min_dynamic_patch != 1:
        return None  # vLLM chooses between equally near grids in no particular order
    return InternVLTokens(
        tile=(images.image_size, images.image_size),
        tokens_per_tile=hf_processor.image_seq_length,
        least_tiles=1,
        most_tiles=images.max_dynamic_patch,
        thumbnail=images.use_thumbnail,
        option="max_dynamic_patch",
    )


def _idefics(processor: Any, options: Options) -> TokenRule | None:
    info = processor.info
    settings = _Settings(processor, options)
    tile = settings.size("max_image_size")["longest_edge"]
    edge = settings.size("size")["longest_edge"]
    if not settings["do_image_splitting"]:
        return _one_view("idefics3", processor, options, {"width": tile, "height": tile})
    if tile % 2:
        return None  # vLLM rounds to even sides and may count a row that does not exist
    hf_processor = info.get_hf_processor(**options)

    @functools.cache
    def prompt_tokens(rows: int, columns: int) -> int:
        """For a picture with this grid; on its shorter side, half of the last tile is empty."""
        width, height = max(columns, 1) * tile, max(rows, 1) * tile
        longest = max(width, height)
        text = info.get_image_repl(
            image_width=width - tile // 2 if width < height else width,
            image_height=height - tile // 2 if height <= width else height,
            processor=hf_processor,
            mm_kwargs={**options, "size": {"longest_edge": longest}},
        )
        return len(cached_encode(info.get_tokenizer(), text, add_special_tokens=False))

    return IdeficsTokens(tile, edge, hf_processor.image_seq_len, prompt_tokens)


def _gemma3(processor: Any, options: Options) -> TokenRule:
    info = processor.info
    size = _Settings(processor, options).size("size")
    scan = _pan_and_scan(info, options)
    if scan is None:
        return _one_view("gemma3", processor, options, size)
    hf_processor = info.get_hf_processor(**options)

    @functools.cache
    def prompt_tokens(crops: int) -> int:
        """For a picture that is wide enough for this number of crops."""
        most = {"pan_and_scan_max_num_crops": crops} if crops else {"do_pan_and_scan": False}
        height = max(1, math.ceil(scan.min_crop))
        width = math.ceil(height * max(scan.min_ratio, 2) * max(crops, 1))
        update = info.get_image_repl(
            image_width=width,
            image_height=height,
            processor=hf_processor,
            mm_kwargs={**options, **most},
        )
        return len(update.full)

    return GemmaTokens(_view(size), hf_processor.image_seq_length, prompt_tokens, scan)


def _pan_and_scan(info: Any, options: Options) -> PanAndScan | None:
    from transformers.models.gemma3.processing_gemma3 import Gemma3ProcessorKwargs

    hf_processor = info.get_hf_processor()
    merged = hf_processor._merge_kwargs(
        Gemma3ProcessorKwargs,
        tokenizer_init_kwargs=hf_processor.tokenizer.init_kwargs,
        **info.ctx.get_merged_mm_kwargs(options),
    )["images_kwargs"]

    def setting(name: str) -> Any:
        return merged.get(name, getattr(hf_processor.image_processor, name))

    if not setting("do_pan_and_scan"):
        return None
    return PanAndScan(
        setting("pan_and_scan_min_crop_size"),
        setting("pan_and_scan_max_num_crops"),
        setting("pan_and_scan_min_ratio_to_activate"),
    )


def _one_view(
    family: str, processor: Any, options: Options, size: Mapping[str, int]
) -> FixedTokens:
    view = _view(size)
    return FixedTokens(family, *count(processor, *view, options), view)


def _view(size: Mapping[str, int]) -> sizing.Size:
    return size["width"], size["height"]


class _Settings:
    """The settings of an image processor: its attributes, overridden by the options."""

    def __init__(self, processor: Any, options: Options) -> None:
        self._images = processor.info.get_hf_processor().image_processor
        merged = processor.info.ctx.get_merged_mm_kwargs(options)
        self._options = {**merged, **(merged.get("images_kwargs") or {})}

    def __getitem__(self, name: str) -> Any:
        return self._options.get(name, getattr(self._images, name, None))

    def size(self, name: str) -> dict[str, int]:
        """A size setting, parts of which options may override."""
        return {**dict(getattr(self._images, name)), **(self._options.get(name) or {})}


_Builder = Callable[[Any, Options], TokenRule | None]
_QWEN2, _QWEN3 = "Qwen2VLMultiModalProcessor", "Qwen3VLMultiModalProcessor"

# Keyed by names: importing vLLM's classes would load the modules of every family.
_BUILDERS: dict[tuple[str, str], _Builder] = {
    ("Qwen2VLProcessingInfo", _QWEN2): _qwen,
    ("Qwen2_5_VLProcessingInfo", "Qwen2_5_VLMultiModalProcessor"): _qwen,
    ("Qwen3VLProcessingInfo", _QWEN3): _qwen,
    ("Qwen3VLMoeProcessingInfo", _QWEN3): _qwen,
    ("Qwen3_5ProcessingInfo", _QWEN3): _qwen,
    ("Qwen3_5MoeProcessingInfo", _QWEN3): _qwen,
    ("Cosmos3ProcessingInfo", _QWEN3): _qwen,
    ("InternS1ProProcessingInfo", _QWEN3): _qwen,
    ("InternS2MobiusProcessingInfo", _QWEN3): _qwen,
    ("InternS2PreviewProcessingInfo", _QWEN3): _qwen,
    ("Qwen4ExpProcessingInfo", _QWEN3): _qwen,
    ("Qwen2_5OmniThinkerProcessingInfo", "Qwen2_5OmniThinkerMultiModalProcessor"): _qwen,
    ("Qwen3OmniMoeThinkerProcessingInfo", "Qwen3OmniMoeThinkerMultiModalProcessor"): _qwen,
    ("DotsOCRProcessingInfo", _QWEN2): _qwen,
    ("Exaone4_5_ProcessingInfo", _QWEN2): _qwen,
    ("PixtralHFProcessingInfo", "PixtralHFMultiModalProcessor"): _pixtral,
    ("Mistral3ProcessingInfo", "Mistral3MultiModalProcessor"): _mistral3,
    ("PixtralProcessingInfo", "PixtralMultiModalProcessor"): _mistral_format,
    ("LlavaProcessingInfo", "LlavaMultiModalProcessor"): _fixed,
    ("PaliGemmaProcessingInfo", "PaliGemmaMultiModalProcessor"): _fixed,
    ("Blip2ProcessingInfo", "Blip2MultiModalProcessor"): _fixed,
    ("InstructBlipProcessingInfo", "InstructBlipMultiModalProcessor"): _fixed,
    ("LlavaNextProcessingInfo", "LlavaNextMultiModalProcessor"): _llava_next,
    ("LlavaOnevisionProcessingInfo", "LlavaOnevisionMultiModalProcessor"): _llava_onevision,
    ("InternS1ProcessingInfo", "InternS1MultiModalProcessor"): _internvl,
    ("InternVLProcessingInfo", "InternVLMultiModalProcessor"): _internvl_chat,
    ("SkyworkR1VProcessingInfo", "BaseInternVLMultiModalProcessor"): _internvl_chat,
    ("QianfanOCRProcessingInfo", "BaseInternVLMultiModalProcessor"): _internvl_chat,
    ("NemotronVLProcessingInfo", "BaseInternVLMultiModalProcessor"): _internvl_chat,
    ("Idefics3ProcessingInfo", "Idefics3MultiModalProcessor"): _idefics,
    ("SmolVLMProcessingInfo", "Idefics3MultiModalProcessor"): _idefics,
    ("Gemma3ProcessingInfo", "Gemma3MultiModalProcessor"): _gemma3,
}

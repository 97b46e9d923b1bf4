"""The token rules against vLLM: a picture takes as many tokens as its rule allocates."""

import ctypes
import functools
import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.cache.base import MultiModalCache
from vllm.multimodal.inputs import (
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.v1.serial_utils import MsgpackEncoder

from server.engine import token_rules
from server.engine.extractor import _export
from server.engine.launch import same_data
from server.engine.vllm_adapter import item_encoder, levels, processors
from server.engine.vllm_adapter.items import ItemMaker, _outline, _TooLarge
from server.engine.vllm_adapter.merging import _is_plain, planned, replaced
from server.engine.vllm_adapter.processor_cache import _Metadata
from server.errors import ImageAspectRatio, ImageTokenCap, InvalidImage
from server.imaging.sizing import Size
from server.imaging.tokens import Count, TokenAllocation, TokenRule
from server.workers.protocol import Features
from server.workers.shared_memory import ArrayWriter, Segment
from server.workers.worker import describe
from tests import families
from tests.processors import created

Options = Mapping[str, Any]

# Tiny, odd, prime, round, of extreme shape, and large.
SIZES: list[Size] = [
    (1, 1), (3, 2), (13, 17), (112, 112), (113, 111), (224, 112), (97, 331), (347, 251),
    (640, 480), (480, 641), (400, 100), (1009, 211), (131, 1201), (1600, 7), (9, 1800), (1, 1248),
    (1153, 944), (2000, 1500),
]  # fmt: skip

# Each family as published, and with server options that change the counts.
PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 64,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
MODELS: dict[str, tuple[str, Options]] = {
    **{family: (family, {}) for family in [*families.FAMILIES, *families.PREPROCESSED]},
    "qwen2_vl, fewer pixels": ("qwen2_vl", {"min_pixels": 15_680, "max_pixels": 70_560}),
    "qwen3_vl, fewer pixels": ("qwen3_vl", {"min_pixels": 5000, "max_pixels": 99_999}),
    "gemma3, pan and scan": ("gemma3", PAN_AND_SCAN),
    "idefics3, larger": ("idefics3", {"size": {"longest_edge": 7 * 112}}),
    "idefics3, unsplit": ("idefics3", {"do_image_splitting": False}),
    "internvl, fewer tiles": ("internvl", {"max_patches": 5, "min_patches": 2}),
    "internvl, uncropped": ("internvl", {"crop_to_patches": False}),
    "internvl_chat, fewer tiles": ("internvl_chat", {"max_dynamic_patch": 7}),
    "internvl_chat, no thumbnail": ("internvl_chat", {"use_thumbnail": False}),
    "internvl_chat, one tile": ("internvl_chat", {"dynamic_image_size": False}),
    "qwen2_5_vl, smaller": ("qwen2_5_vl", {"size": {"shortest_edge": 9, "longest_edge": 60_000}}),
    "mistral3, smaller": ("mistral3", {"size": {"longest_edge": 299}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def processor(model: str, checkpoints: Path) -> Any:
    family, options = MODELS[model]
    return created(family, checkpoints, options)


@functools.cache
def rule(model: str, checkpoints: Path) -> TokenRule:
    found = token_rules.token_rule(processor(model, checkpoints), {})
    assert found is not None
    return found


def caps(rule: TokenRule, natural: int, fewest: int) -> list[int]:
    """The lowest possible cap, just less than the picture takes, and some in between."""
    between = [fewest + (natural - fewest) * part // 4 for part in (1, 2, 3)]
    wanted = {fewest, fewest + 1, *between, rule.low, natural - 1, natural}
    return sorted(cap for cap in wanted if fewest <= cap <= natural)


def counted(processor: Any, width: int, height: int, got: TokenAllocation) -> Count:
    return token_rules.count(processor, *(got.resize or (width, height)), got.options)


@pytest.mark.parametrize("model", MODELS)
def test_allocated_tokens_equal_the_engines(model: str, checkpoints: Path) -> None:
    chosen, real = rule(model, checkpoints), processor(model, checkpoints)
    check_sizes(chosen, real, SIZES)


def check_sizes(chosen: TokenRule, real: Any, sizes: list[Size]) -> None:
    measured = functools.cache(lambda size, options: token_rules.count(real, *size, dict(options)))
    for width, height in sizes:
        try:
            natural = chosen.allocate(width, height)
        except ImageAspectRatio:
            with pytest.raises((ValueError, RuntimeError)):
                token_rules.count(real, width, height, {})
            continue
        assert natural.resize is None
        assert natural.options == {}
        fewest = chosen.fewest(width, height)
        assert chosen.least <= fewest <= natural.tokens
        assert chosen.most is not None
        assert natural.tokens <= chosen.most
        with pytest.raises(ImageTokenCap):
            chosen.allocate(width, height, fewest - 1)
        for cap in [None, *caps(chosen, natural.tokens, fewest)]:
            got = chosen.allocate(width, height, cap)
            options = tuple((name, _frozen(value)) for name, value in got.options.items())
            real_count = measured(got.resize or (width, height), options)
            assert real_count == (got.tokens, got.prompt_tokens), (
                width,
                height,
                cap,
                got,
            )
            assert cap is None or got.tokens <= cap
            if cap is not None and cap >= natural.tokens:
                assert got == natural


def _frozen(value: Any) -> Any:
    return _Frozen(value) if isinstance(value, dict) else value


class _Frozen(dict[str, Any]):
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


# ------------------------------------------------------------------ the placeholders in a prompt


@pytest.mark.parametrize("model", MODELS)
def test_placeholders_in_a_prompt_match_the_rule(model: str, checkpoints: Path) -> None:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    chosen, real = rule(model, checkpoints), processor(model, checkpoints)
    text = real.dummy_inputs.get_dummy_text({"image": 1})
    tokens = real.info.get_tokenizer().encode("what?" + text + "why?", add_special_tokens=False)
    width, height = 530, 301
    for cap in (None, max(chosen.fewest(width, height), chosen.allocate(width, height).tokens - 1)):
        got = chosen.allocate(width, height, cap)
        image = Image.new("RGB", got.resize or (width, height))
        if levels.is_placed_by_tokenizer(type(real)):
            tokens = processors.placeholder_of(real, image.size)
        inputs = ProcessorInputs(
            list(tokens),
            real.info.parse_mm_data({"image": [image]}),
            hf_processor_mm_kwargs=got.options,
        )
        (placeholder,) = real.apply(inputs, TimingContext())["mm_placeholders"]["image"]
        assert placeholder.get_num_embeds() == got.tokens
        assert placeholder.length == got.prompt_tokens


# ------------------------------------------------------------------ items of equal sizes


@pytest.mark.parametrize("model", MODELS)
def test_an_item_of_a_known_size_equals_vllms(model: str, checkpoints: Path) -> None:
    """The remembered layout of one picture fits others of the same size. Its message and its size
    are known before there are tensors."""
    real = processor(model, checkpoints)
    maker = ItemMaker(real)
    encoder, vllm_encoder = MsgpackEncoder(), MsgpackEncoder()
    item_encoder.use_elements(encoder)
    noise = np.random.default_rng(1)
    for width, height in [(347, 251), (61, 59)]:
        for number in range(3):
            pixels = noise.integers(0, 256 >> number, (height, width, 3), dtype=np.uint8)
            outputs, _ = processors.processed(real, Image.fromarray(pixels), {})
            blank = processors.blank((width, height))
            item, updates = processors.item(real, outputs, blank, {})
            got, got_updates = maker.item(shared(outputs, (width, height)), {}, b"{}")
            assert len(got) == len(item)
            assert messages(encoder, got) == messages(vllm_encoder, item)
            assert _Metadata(got, ()).item_size == MultiModalCache.get_item_size(item)
            assert got.keys() == item.keys()
            assert all(same_data(got[name].data, item[name].data) for name in item)
            assert list(map(inserted, got_updates)) == list(map(inserted, updates))
    if model.startswith("qwen"):
        assert got.elements is not None


@pytest.mark.parametrize("model", MODELS)
def test_images_take_the_same_places_as_with_vllms_planner(model: str, checkpoints: Path) -> None:
    real = processor(model, checkpoints)
    sizes = [(347, 251), (61, 59), (347, 251)]
    items = []
    for size in sizes:
        image = Image.new("RGB", size)
        items.append(processors.item(real, processors.processed(real, image, {})[0], image, {}))
    prompt = [900001]  # tokens that no target has
    for _, updates in items:
        target = updates[0].target
        prompt += [*(target if isinstance(target, list) else []), 900002, 900003]
    for count in (1, 2, 3):
        media = {"image": items[:count]}
        placed = replaced(prompt, media)
        if placed is not None and _is_plain(type(real)):
            tokens, places = planned(real, prompt, {"image": ["a", "b", "c"][:count]}, media)
            assert placed[0] == tokens
            assert list(map(described, placed[1]["image"])) == list(map(described, places["image"]))
    media = {"image": items}
    assert replaced(prompt[:1], media) is None
    if model.startswith("qwen"):
        assert replaced(prompt, media) is not None
        assert replaced(prompt[:-4], media) is None  # fewer places than images


def described(place: PlaceholderRange) -> Any:
    mask = None if place.is_embed is None else place.is_embed.tolist()
    return place.offset, place.length, mask


def messages(encoder: MsgpackEncoder, item: MultiModalKwargsItem) -> list[bytes]:
    """The parts of the message in which an item goes to the engine core."""
    return list(map(bytes, encoder.encode(item)))


def inserted(update: Any) -> Any:
    """The contents of a prompt update, without its functions, which differ each time."""
    target = update.target if isinstance(update.target, str | list) else type(update.target)
    return update.mode, target, update.content.full


def shared(outputs: Mapping[str, Any], size: Size) -> Features:
    """What the Hugging Face processor returned, as the server gets it from a worker."""
    writer = ArrayWriter()
    specs = {name: describe(_export(value), writer) for name, value in outputs.items()}
    segment = Segment.create(max(1, writer.nbytes))
    writer.write(segment.map)
    buffer = (ctypes.c_char * segment.capacity).from_buffer(segment.map)
    return Features(specs, buffer, size, 0.0, 0.0)


def test_large_masks_are_not_cached() -> None:
    def outline(data: torch.Tensor) -> Any:
        features = shared({"x": data}, (1, 1))
        return _outline(features.specs["x"], features.buffer)

    with pytest.raises(_TooLarge):
        outline(torch.zeros(100, 100, dtype=torch.bool))
    assert outline(torch.full((1, 3), 1)) != outline(torch.full((1, 3), 2))
    assert outline(torch.zeros(99, 99)) == outline(torch.ones(99, 99))


# ------------------------------------------------------------------ the encoder's input

SHAPES: list[Size] = [(347, 251), (113, 560), (900, 300), (61, 59)]


def features(processor: Any, image: Image.Image, options: Options) -> Any:
    items = processor.info.parse_mm_data({"image": [image]})
    outputs = BatchFeature(dict(processor._apply_hf_processor_main(items, options)))
    fields = processor._get_mm_fields_config(outputs, options)
    item = MultiModalKwargsItems.from_hf_inputs(outputs, fields)["image"][0]
    for name, part in item.items():
        assert _elements(part.data) == _elements(outputs[name]), name  # nothing is left over
    return item


def _elements(data: Any) -> int:
    if isinstance(data, torch.Tensor):
        return data.numel()
    return sum(map(_elements, data))


def seen(model: str, item: Any, got: TokenAllocation) -> Size:
    """(width, height) of the encoder's input, from the features."""
    family = model.partition(",")[0]
    if "image_grid_thw" in item:
        patch = 16 if family.startswith("qwen3") else 14
        _, rows, columns = item["image_grid_thw"].data.tolist()
        return columns * patch, rows * patch
    names = ("pixel_values", "pixel_values_flat", "images")
    pixels = next(item[name].data for name in names if name in item)
    if family in ("llava_next", "llava_onevision"):
        return white(pixels, got)
    height, width = pixels.shape[-2:]
    tiles = 1 if pixels.ndim == 3 or family == "gemma3" else len(pixels)
    if tiles == 1:
        return width, height
    columns, rows = got.processed[0] // width, got.processed[1] // height
    thumbnail = model != "internvl_chat, no thumbnail"
    assert columns * rows + thumbnail == tiles
    return columns * width, rows * height


def white(tiles: torch.Tensor, got: TokenAllocation) -> Size:
    """The size of a white picture in the tiles of a grid, after the base view."""
    side = tiles.shape[-1]
    for rows in range(1, len(tiles)):
        columns = (len(tiles) - 1) // rows
        if rows * columns == len(tiles) - 1:
            canvas = tiles[1:, 0].reshape(rows, columns, side, side).permute(0, 2, 1, 3)
            bright = (canvas.reshape(rows * side, columns * side) > 0).numpy()
            down, across = bright.any(axis=1).nonzero()[0], bright.any(axis=0).nonzero()[0]
            filled = bright[np.ix_(down, across)].all()
            centred = abs(int(down[0]) - (rows * side - 1 - int(down[-1]))) <= 1
            if filled and centred and len(down) == down[-1] - down[0] + 1:
                size = len(across), len(down)
                if size == got.processed:
                    return size
    return 0, 0


@pytest.mark.parametrize("model", MODELS)
def test_the_processed_size_is_that_of_the_encoders_input(model: str, checkpoints: Path) -> None:
    chosen, real = rule(model, checkpoints), processor(model, checkpoints)
    for width, height in SHAPES:
        natural = chosen.allocate(width, height)
        fewest = chosen.fewest(width, height)
        for cap in {None, fewest, (fewest + natural.tokens) // 2}:
            got = chosen.allocate(width, height, cap)
            image = Image.new("RGB", got.resize or (width, height), "white")
            assert seen(model, features(real, image, got.options), got) == got.processed


@pytest.mark.parametrize("size", [(347, 251), (251, 347), (400, 112), (113, 500), (640, 640)])
def test_the_region_is_where_the_processor_cropped(size: Size, checkpoints: Path) -> None:
    """LLaVA-1.5 sees the centre: a brightness ramp shows which part it was given."""
    chosen, real = rule("llava", checkpoints), processor("llava", checkpoints)
    width, height = size
    got = chosen.allocate(width, height)
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    pixels = np.stack([x * 255, y * 255, 0 * x], axis=-1).astype(np.uint8)
    made = features(real, Image.fromarray(pixels), {})["pixel_values"].data.numpy()
    means, deviations = (0.48145466, 0.4578275), (0.26862954, 0.26130258)
    for channel, side in ((0, width), (1, height)):
        shown = (made[channel] * deviations[channel] + means[channel]) * side
        along = shown.mean(axis=0 if channel == 0 else 1)
        expected = [got.original(i + 0.5, i + 0.5)[channel] for i in range(112)]
        assert np.abs(along[2:-2] - np.array(expected)[2:-2]).max() < 0.02 * side


@pytest.mark.parametrize("model", ["internvl", "internvl_chat", "idefics3", "smolvlm"])
def test_tiles_are_where_the_rule_says(model: str, checkpoints: Path) -> None:
    """Joined row by row, the tiles give horizontal and vertical brightness ramps."""
    chosen, real = rule(model, checkpoints), processor(model, checkpoints)
    for width, height in SHAPES:
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
        natural = chosen.allocate(width, height)
        for got in (
            natural,
            chosen.allocate(width, height, max(natural.tokens - 1, chosen.least)),
        ):
            item = features(real, image, got.options)
            tiles = item["pixel_values_flat" if model == "internvl_chat" else "pixel_values"].data
            side = tiles.shape[-1]
            columns, rows = got.processed[0] // side, got.processed[1] // side
            canvas = tiles[: rows * columns, :2].reshape(rows, columns, 2, side, side)
            canvas = canvas.permute(2, 0, 3, 1, 4).reshape(2, rows * side, columns * side)
            across, down = canvas[0].mean(dim=0).diff(), canvas[1].mean(dim=1).diff()
            assert across.min() > -0.02
            assert down.min() > -0.02


# ------------------------------------------------------------------ the settings as published

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_vl": {"preprocessor_config": {"max_pixels": 28 * 28 * 16384}},
    "qwen3_vl": {
        "preprocessor_config": {"size": {"shortest_edge": 256**2, "longest_edge": 4096**2}},
    },
    "pixtral": {
        "config": {"vision_config": {"image_size": 1024}},
        "preprocessor_config": {"size": {"longest_edge": 1024}},
    },
    "mistral3": {"preprocessor_config": {"size": {"longest_edge": 1540}}},
    "llava_next": {
        "config": {
            "vision_config": {"image_size": 336},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
        "preprocessor_config": {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
    },
    "llava_onevision": {
        "config": {
            "vision_config": {"image_size": 384},
            "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        },
        "preprocessor_config": {
            "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        },
    },
    "internvl": {
        "preprocessor_config": {"size": {"height": 448, "width": 448}},
        "processor_config": {"image_seq_length": 256},
    },
    "internvl_chat": {"config": {"vision_config": {"image_size": 448}}},
    "idefics3": {
        "preprocessor_config": {
            "size": {"longest_edge": 4 * 364},
            "max_image_size": {"longest_edge": 364},
        },
        "processor_config": {"image_seq_len": 169},
    },
    "smolvlm": {
        "preprocessor_config": {
            "size": {"longest_edge": 4 * 512},
            "max_image_size": {"longest_edge": 512},
        },
        "processor_config": {"image_seq_len": 64},
    },
    "gemma3": {
        "preprocessor_config": {
            "size": {"height": 896, "width": 896},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
        "processor_config": {"image_seq_length": 256},
    },
}
"""What the large models set otherwise than the tiny checkpoints, file by file."""


@functools.cache
def published(family: str, checkpoints: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    model = checkpoints / "published" / family
    shutil.copytree(families.build(family, checkpoints), model)
    for name, changes in PUBLISHED[family].items():
        file = model / f"{name}.json"
        content = json.loads(file.read_text())
        for key, value in changes.items():
            nested = key == "vision_config"
            content[key] = {**content[key], **value} if nested else value
        file.write_text(json.dumps(content))
    args = AsyncEngineArgs(model=str(model), trust_remote_code=True, max_model_len=4096)
    return MULTIMODAL_REGISTRY.create_processor(args.create_model_config())


def predicted(real: Any, width: int, height: int, options: Options) -> int:
    """vLLM's own prediction, which runs no processor."""
    count = real.info.get_num_image_tokens
    wanted = inspect.signature(count).parameters
    possible = {
        "image_width": width,
        "image_height": height,
        "mm_kwargs": options,
        "processor": hf_processor(real, json.dumps(options)),
        "image_processor": hf_processor(real, json.dumps(options)).image_processor,
    }
    return int(count(**{name: possible[name] for name in wanted}))


@functools.cache
def hf_processor(real: Any, options: str) -> Any:
    return real.info.get_hf_processor(**json.loads(options))


@pytest.mark.parametrize("family", PUBLISHED)
def test_rules_match_vllm_for_published_settings(family: str, checkpoints: Path) -> None:
    """Many picture sizes, with the published tile sizes."""
    real = published(family, checkpoints)
    chosen = token_rules.token_rule(real, {})
    assert chosen is not None
    random = Random(family)
    sizes = [tuple(random.randint(200, 3000) for _ in "wh") for _ in range(250)]
    sizes += [tuple(int(10 ** random.uniform(0, 3.8)) for _ in "wh") for _ in range(150)]
    for width, height in sizes:
        try:
            natural = chosen.allocate(width, height)
        except ImageAspectRatio:
            continue
        assert predicted(real, width, height, {}) == natural.tokens, (width, height)
        fewest = chosen.fewest(width, height)
        for cap in (fewest, random.randint(fewest, natural.tokens), natural.tokens - 1):
            if cap >= fewest:
                got = chosen.allocate(width, height, cap)
                size = got.resize or (width, height)
                tokens = predicted(real, *size, got.options)
                assert tokens == got.tokens <= cap, (width, height, cap)


# ------------------------------------------------------------------ choice of the rule


def test_processor_options_of_a_request_change_the_rule(checkpoints: Path) -> None:
    real = processor("qwen2_vl", checkpoints)
    chosen = token_rules.token_rule(real, {"max_pixels": 28 * 28 * 50})
    assert chosen is not None
    assert chosen.most == max(50, 100)
    assert chosen.allocate(1000, 1000).tokens <= 50


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen2_vl", {"do_resize": False}),
        ("internvl_chat", {"min_dynamic_patch": 2}),
        ("idefics3", {"max_image_size": {"longest_edge": 111}}),
        ("llava_next", {"image_grid_pinpoints": [[112, 112]]}),
        ("llava", {"do_center_crop": False}),
    ],
)
def test_options_that_no_rule_supports_give_no_rule(
    model: str, options: Options, checkpoints: Path
) -> None:
    assert token_rules.token_rule(processor(model, checkpoints), options) is None


def test_an_unknown_processor_has_no_rule(checkpoints: Path) -> None:
    real = processor("llava_next", checkpoints)
    renamed = type("OtherProcessor", (type(real),), {})
    other = renamed(real.info, real.dummy_inputs)
    assert token_rules.token_rule(other, {}) is None


@pytest.mark.parametrize("model", ["llava_next", "qwen2_vl", "pixtral", "idefics3"])
def test_measured_tokens_equal_the_engines(model: str, checkpoints: Path) -> None:
    chosen, real = rule(model, checkpoints), processor(model, checkpoints)
    measured = token_rules.measured_rule(real, {})
    for width, height in [(500, 333), (97, 331)]:
        natural = chosen.allocate(width, height)
        got = measured.allocate(width, height)
        assert (got.tokens, got.prompt_tokens) == (
            natural.tokens,
            natural.prompt_tokens,
        )
        fewest = measured.fewest(width, height)
        if fewest == natural.tokens:  # resizing changes nothing
            with pytest.raises(ImageTokenCap):
                measured.allocate(width, height, fewest - 1)
            continue
        for cap in (fewest, (fewest + natural.tokens) // 2, natural.tokens - 1):
            got = measured.allocate(width, height, cap)
            assert got.tokens <= cap
            assert counted(real, width, height, got) == (
                got.tokens,
                got.prompt_tokens,
            )


def test_measuring_refuses_sizes_that_the_processor_refuses(checkpoints: Path) -> None:
    measured = token_rules.measured_rule(processor("qwen2_vl", checkpoints), {})
    with pytest.raises(InvalidImage):
        measured.allocate(1000, 2)

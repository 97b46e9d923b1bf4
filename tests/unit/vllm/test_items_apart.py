"""Pictures processed one by one give what vLLM makes of all pictures of a prompt at once."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm.multimodal.cache import MultiModalProcessorOnlyCache

from server.engine import token_rules
from server.engine.launch import same_data
from server.engine.vllm_adapter import levels, processors
from server.engine.vllm_adapter.merging import merged
from tests import families, pictures
from tests import processors as processors_of

ALL = [*families.PREPROCESSED, *families.MEASURED]
PHOTO, WIDE = pictures.photo((640, 480), 1), pictures.photo((300, 100), 2)
PROMPTS = {
    "one": [PHOTO],
    "two": [PHOTO, WIDE],
    "swapped": [WIDE, PHOTO],
    "twice": [WIDE, WIDE],
    "three": [WIDE, PHOTO, WIDE],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def processor(family: str, checkpoints: Path) -> Any:
    return processors_of.created(family, checkpoints)


@pytest.mark.parametrize("family", ALL)
def test_pictures_apart_give_what_vllm_makes_of_all(family: str, checkpoints: Path) -> None:
    real = processor(family, checkpoints)
    limits = (levels.images_apart(type(real)), most_images(real))
    cache = MultiModalProcessorOnlyCache(real.info.ctx.model_config)
    for name, images in PROMPTS.items():
        if all(limit is None or len(images) <= limit for limit in limits):
            check(real, images, name, cache)


def most_images(real: Any) -> int | None:
    """How many the model takes in a prompt."""
    limit: int | None = real.info.supported_mm_limits[levels.modality_of(real)]
    return limit


def check(
    real: Any, images: Sequence[Image.Image], name: str, cache: MultiModalProcessorOnlyCache
) -> None:
    """Families that pad pictures to each other's size do so only where vLLM has not `cache`d them:
    it holds each by now."""
    modality = levels.modality_of(real)
    keys = [f"{name} {index}" for index in range(len(images))]
    outputs = [processors.processed(real, image, {})[0] for image in images]
    items = [
        processors.item(real, made, processors.blank(image.size), {})
        for made, image in zip(outputs, images, strict=True)
    ]
    prompt, expanded = prompts(real, images)
    ours = merged(real, prompt, {modality: keys}, {modality: items})
    data = {modality: [levels.as_item(modality, image) for image in images]}
    for image in images:
        one = {modality: [levels.as_item(modality, image)]}
        real(prompts(real, [image])[1], real.info.parse_mm_data(one), cache=cache)
    theirs = real(expanded, real.info.parse_mm_data(data), cache=cache)
    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"], name
    assert ours["mm_placeholders"] == theirs["mm_placeholders"], name
    pairs = zip(ours["mm_kwargs"][modality], theirs["mm_kwargs"][modality], strict=True)
    for mine, other in pairs:
        assert mine.keys() == other.keys(), name
        for field in mine:
            assert same_data(mine[field].data, other[field].data), (name, field)


def prompts(real: Any, images: Sequence[Image.Image]) -> tuple[list[int], list[int]]:
    """The tokens of a prompt as our renderer and as vLLM's has them."""
    if levels.is_placed_by_tokenizer(type(real)):
        ours = processors.standing_for_a_picture(real) * len(images)
        theirs = [processors.placeholder_of(real, image.size) for image in images]
        return ours, [token for tokens in theirs for token in tokens]
    text = real.dummy_inputs.get_dummy_text({levels.modality_of(real): len(images)})
    tokens = real.info.get_tokenizer().encode(text, add_special_tokens=False)
    return tokens, list(tokens)


@pytest.mark.parametrize("family", ALL)
def test_counted_tokens_are_those_of_the_prompt(family: str, checkpoints: Path) -> None:
    """Of a picture alone, and of one of more than the processor treats apart."""
    real = processor(family, checkpoints)
    most, modality = levels.images_apart(type(real)), levels.modality_of(real)
    for copies in {1, max(most or 0, 1) + 1} if most_images(real) is None else {1}:
        counted = token_rules.count(real, 640, 480, {}, copies)
        images = [Image.new("RGB", (640, 480))] * copies
        data = {modality: [levels.as_item(modality, image) for image in images]}
        made = real(prompts(real, images)[1], real.info.parse_mm_data(data))
        places = made["mm_placeholders"][modality]
        assert [place.get_num_embeds() for place in places] == [counted.tokens] * copies
        assert [place.length for place in places] == [counted.prompt_tokens] * copies

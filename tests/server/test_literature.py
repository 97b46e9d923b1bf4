"""Systems of the literature answer, and as transformers' own implementation does.

One engine with two renderers, as in `test_parity.py`. Here all logits of eight steps are also
compared with those that transformers computes from the same picture and text, in float32.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from server.errors import ImageTokenCap
from server.imaging import header as headers
from server.request import context as contexts
from server.request.context import RequestContext
from server.telemetry.record import Record
from tests import families, pictures
from tests.server.test_parity import Rig, assert_same, prepared, rig
from tests.starts import template

QUESTION = "what is shown here?"
TEXT = pictures.text_part(QUESTION)
SIZE = (300, 100)
STEPS = 8
TOLERANCE = 1e-3
FLAGS = ("--logprobs-mode", "raw_logits", "--max-logprobs", "-1")


@dataclass(frozen=True)
class System:
    """What is particular to a system.

    Attributes:
        tokens: of a picture of `SIZE`, and those that it has in the prompt.
        pooled: its images are processed one by one.
        several: it takes several images.
    """

    tokens: tuple[int, int]
    pooled: bool = True
    several: bool = True


SYSTEMS = {
    "idefics2": System((64, 66)),
    "instructblip": System((32, 32), pooled=False, several=False),
    "blip2_opt": System((32, 32), several=False),
}
DAILY = ("idefics2",)
"""The others run nightly."""


async def logits_of(both: Rig, rendered: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logits of each step: float32 (steps, vocabulary)."""
    from vllm import SamplingParams

    contexts.enter(RequestContext(Record()))
    params = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=-1, ignore_eos=True)
    async for output in both.engine.generate(rendered, params, "logits"):
        final = output.outputs[0]
    rows = [[step[token].logprob for token in range(len(step))] for step in final.logprobs]
    return list(final.token_ids), torch.tensor(rows)


def reference(model: Path, image: Image.Image, rendered: Any, answer: list[int]) -> torch.Tensor:
    """The logits of the same steps by transformers. The prompt must be the same, too."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(model)
    messages = pictures.user({"type": "image"}, TEXT)
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = dict(processor(text=text, images=[image], return_tensors="pt"))
    prompt = rendered["prompt_token_ids"]
    tokens = torch.tensor([[*prompt, *answer[:-1]]])
    assert inputs["input_ids"][0].tolist() == prompt
    inputs = {name: grown(each, len(prompt), len(answer) - 1) for name, each in inputs.items()}
    inputs["input_ids"] = tokens
    loaded = transformers.AutoModelForImageTextToText
    network = loaded.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        network.eval()
        return network(**inputs).logits[0, len(prompt) - 1 :]


def grown(value: Any, length: int, more: int) -> Any:
    """What has a number for each token of the prompt, for `more` tokens: masks of text."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] != length:
        return value
    return torch.cat([value, value[:, -1:].repeat_interleave(more, dim=1)], dim=1)


async def check_system(name: str, directory: Path) -> None:
    model, system = families.build(name, directory), SYSTEMS[name]
    photo = pictures.photo(SIZE, 2)
    data = pictures.encode(photo)
    one = pictures.user(pictures.image_part(data), TEXT)
    async with rig(model, FLAGS) as both:
        assert both.pooled == system.pooled
        ours, theirs = await both.ours(one), await both.plain(one)
        assert_same(ours, theirs)
        (place,) = ours["mm_placeholders"]["image"]
        assert (place.get_num_embeds(), place.length) == system.tokens
        answer, logits = await logits_of(both, ours)
        difference = (logits - reference(model, photo, ours, answer)).abs().max()
        assert difference < TOLERANCE, difference
        assert (await logits_of(both, theirs))[0] == answer
        text = await both.ours(pictures.user(TEXT))
        assert len((await logits_of(both, text))[0]) == STEPS
        if system.several:
            again = pictures.user(*[pictures.image_part(data)] * 2, TEXT)
            ours, theirs = await both.ours(again), await both.plain(again)
            assert_same(ours, theirs)
            assert (await logits_of(both, ours))[0] == (await logits_of(both, theirs))[0]
        await check_cap(both, data)


async def check_cap(both: Rig, data: bytes) -> None:
    """A cap is held; one below what the picture must take is refused."""
    rule = both.engine.renderer.allocator.rule({})
    size = headers.read(data).size
    fewest, natural = rule.fewest(*size), rule.allocate(*size).tokens
    for cap in {fewest, natural}:
        capped = pictures.user(pictures.image_part(data, max_tokens=cap), TEXT)
        (place,) = (await both.ours(capped))["mm_placeholders"]["image"]
        assert place.get_num_embeds() <= cap
    refused = pictures.user(pictures.image_part(data, max_tokens=fewest - 1), TEXT)
    with pytest.raises(ImageTokenCap):
        await both.ours(refused)


def check(name: str, directory: str) -> None:
    """Runs in a fork of the template."""
    prepared()
    asyncio.run(check_system(name, Path(directory)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in DAILY else pytest.mark.nightly) for name in SYSTEMS],
)
def test_each_system_answers_as_in_transformers(name: str, tmp_path: Path) -> None:
    done = template().run(f"{__name__}:check", name, str(tmp_path))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr

"""The image pool gives the same features as plain vLLM, for each model family.

Two renderers feed one engine: ours, through the worker pool in `exact` mode, and vLLM's,
unchanged, with its own media connector and preprocessing.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.imaging import header as headers
from server.ingest.load import MediaLoader
from server.request import context as contexts
from server.request.context import RequestContext
from server.request.dialects import dialect_of
from server.request.read import RequestReader
from server.telemetry.record import Record
from server.workers.pool import ImagePool
from tests import families, pictures
from tests.media import BOUNDS, CHAT
from tests.starts import template

SINGLE_IMAGE = {"paligemma"}
TEXT = pictures.text_part("what is shown here?")


@dataclass
class Rig:
    """One engine with two renderers: ours and vLLM's."""

    engine: Any
    theirs: Any
    pooled: bool
    loader: MediaLoader

    @property
    def modality(self) -> str:
        """What the model's processor calls an image."""
        from server.engine.vllm_adapter.levels import modality_of

        return modality_of(self.engine.renderer.get_mm_processor())

    async def render(self, renderer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
        from vllm.renderers import ChatParams

        connector = "saccade" if renderer is self.engine.renderer else "http"
        os.environ["VLLM_MEDIA_CONNECTOR"] = connector
        _, (rendered,) = await renderer.render_chat_async([messages], ChatParams(), **options)
        return rendered

    async def ours(self, messages: list[dict[str, Any]]) -> Any:
        reader = RequestReader(self.loader.limits, frozenset(), BOUNDS)
        body = json.dumps({"messages": messages}).encode()
        found = reader.read(body, dialect_of(CHAT), Record())
        await self.loader.load(found.context)
        handles = json.loads(found.rewritten())["messages"]
        contexts.enter(found.context)
        return await self.render(self.engine.renderer, handles)

    async def plain(self, messages: list[dict[str, Any]]) -> Any:
        return await self.render(self.theirs, messages, skip_mm_cache=True)

    async def answer(self, rendered: Any) -> list[tuple[int, float]]:
        """Greedy token ids and their log-probabilities."""
        from vllm import SamplingParams

        self.count = getattr(self, "count", 0) + 1
        contexts.enter(RequestContext(Record()))
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
        async for output in self.engine.generate(rendered, params, f"r{self.count}"):
            final = output.outputs[0]
        return [
            (token, step[token].logprob)
            for token, step in zip(final.token_ids, final.logprobs, strict=True)
        ]


@contextlib.asynccontextmanager
async def rig(model: Path, more: Sequence[str] = (), decode: str = "exact") -> AsyncIterator[Rig]:
    from vllm import envs
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import tokenizer_args_from_config
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from server.engine import launch
    from server.engine.arguments import parse
    from server.engine.vllm_adapter.outcomes import Outcomes
    from server.engine.vllm_adapter.send import Gate
    from server.ingest.expand import Expander
    from server.ingest.fetch import Fetcher, FetchSettings

    flags = ["--image-workers", "2", "--image-decode", decode, "--max-model-len", "4096"]
    args, settings = parse([str(model), *flags, *more, "--mm-processor-cache-gb", "0.1"])
    renderers = dict(RENDERER_REGISTRY.renderers)
    plan = launch.prepare(args, settings)
    assert plan.workers is not None
    async with contextlib.AsyncExitStack() as stack:
        pool = ImagePool(plan.workers, settings.images)
        stack.callback(pool.stop_preload)
        pool.preload()
        embeddings = launch.add_embedding_cache(plan, settings)
        if embeddings is not None:  # the model has no cross-attention
            await stack.enter_async_context(embeddings)
        engine, *_ = await stack.enter_async_context(
            launch.running(plan, settings, Outcomes(), Gate())
        )
        envs.disable_envs_cache()  # `render` changes an environment variable
        await stack.enter_async_context(pool)
        limits = launch.media_limits(engine, settings)
        assert limits is not None
        expander = Expander(pool, limits)
        loader = MediaLoader(Fetcher(FetchSettings()), limits, None, None, expander)
        decoder = launch.clip_decoder(settings, pool.forkserver)
        stack.callback(decoder.close)
        used = await launch.connect(engine, settings, pool, decoder, embeddings)
        mode, *_ = tokenizer_args_from_config(plan.config.model_config)
        kind = resolve_obj_by_qualname(".".join(renderers[mode]))
        theirs = kind(plan.config, engine.renderer.tokenizer)
        assert used.encoded
        yield Rig(engine, theirs, used.pooled, loader)


def assert_same(ours: Any, theirs: Any) -> None:
    """Token ids and placeholders are equal, and so are features, bit for bit, if both have them."""
    from server.engine.launch import same_data

    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert ours["type"] == theirs["type"]
    if ours["type"] != "multimodal":
        return
    assert ours["mm_placeholders"] == theirs["mm_placeholders"]
    (modality,) = ours["mm_placeholders"]
    pairs = zip(ours["mm_kwargs"][modality], theirs["mm_kwargs"][modality], strict=True)
    for mine, other in pairs:
        if not mine:  # cached by the engine; compared when it was new
            continue
        assert mine.keys() == other.keys()
        for name in mine:
            assert same_data(mine[name].data, other[name].data), name
            assert mine[name].field == other[name].field


async def check_caps(both: Rig, images: list[bytes]) -> None:
    """Capped images take the number of tokens allocated to them."""
    rule = both.engine.renderer.allocator.rule({}, len(images))
    parts, caps = [], []
    for data in images:
        size = headers.read(data).size
        fewest, natural = rule.fewest(*size), rule.allocate(*size).tokens
        caps.append((fewest + natural) // 2)
        parts.append(pictures.image_part(data, max_tokens=caps[-1]))
    rendered = await both.ours(pictures.user(*parts, TEXT))
    tokens = [place.get_num_embeds() for place in rendered["mm_placeholders"][both.modality]]
    allocated = [
        rule.allocate(*headers.read(data).size, cap).tokens
        for data, cap in zip(images, caps, strict=True)
    ]
    assert tokens == allocated
    assert all(count <= cap for count, cap in zip(tokens, caps, strict=True))
    assert len(await both.answer(rendered)) == 8


async def check_family(family: str, directory: Path) -> None:
    from server.engine.vllm_adapter import levels

    model = families.build(family, directory)
    photo = pictures.encode(pictures.photo((640, 480), 1), "JPEG", quality=90)
    wide = pictures.encode(pictures.photo((300, 100), 2))
    large = pictures.encode(pictures.photo((1600, 1200), 3), "JPEG", quality=90)
    conversations = {
        "one": pictures.user(pictures.image_part(photo), TEXT),
        "wide": pictures.user(pictures.image_part(wide), TEXT),
        "large": pictures.user(TEXT, pictures.image_part(large)),
        "text": pictures.user(TEXT),
        "again": pictures.user(pictures.image_part(photo), TEXT),
        "uuid": pictures.user(pictures.image_part(wide, uuid="a-name"), TEXT),
    }
    if family not in SINGLE_IMAGE:
        two = [pictures.image_part(photo), TEXT, pictures.image_part(wide)]
        conversations["two"] = pictures.user(*two)
        conversations["swapped"] = pictures.user(*reversed(two))
        conversations["twice"] = pictures.user(*[pictures.image_part(wide)] * 2, TEXT)
    more = families.FLAGS.get(family, [])
    if family not in families.FAMILIES:  # the engine draws small weights: answers depend on little
        more = [*more, "--load-format", "dummy", "--dtype", "float32"]
    async with rig(model, more) as both:
        kind = type(both.engine.renderer.get_mm_processor())
        assert both.pooled == (levels.level(kind) == "pooled")
        apart = max(levels.images_apart(kind) or 9, 1)
        for name, messages in conversations.items():
            ours, theirs = await both.ours(messages), await both.plain(messages)
            assert_same(ours, theirs)
            answer = await both.answer(ours)
            # vLLM has one name for a picture that is one of many, and for the same picture alone,
            # and may answer by what its encoder cache has of the other one.
            if len(ours.get("mm_placeholders", {}).get(both.modality, ())) <= apart:
                assert answer == await both.answer(theirs), name
        await check_caps(both, [photo, wide, large][: 1 if family in SINGLE_IMAGE else 3])
        named = {"type": "image_url", "image_url": None, "uuid": "a-name"}
        by_name = await both.ours(pictures.user(named, TEXT))
        theirs = await both.plain(conversations["wide"])
        assert_same(by_name, theirs)
        assert await both.answer(by_name) == await both.answer(theirs)


def check(family: str, directory: str, stubs: str) -> None:
    """Runs in a fork of the template."""
    sys.path.insert(0, stubs)
    os.environ["PYTHONPATH"] = stubs  # for an executed forkserver
    os.environ.update(families.ENVIRONMENT.get(family, {}))
    prepared()
    asyncio.run(check_family(family, Path(directory)))


def prepared() -> None:
    """Start what must be started before an engine, in a fork of the template."""
    from vllm.model_executor.models import registry

    from server.engine.vllm_adapter import core_fork
    from server.workers import template as workers

    # Otherwise vLLM starts a process to inspect each model class that is new to it.
    registry._run_in_subprocess = lambda look: look()
    workers.prepare()
    core_fork.prepare()


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.import_stubs(tmp_path_factory.mktemp("stubs"))


@pytest.mark.parametrize("family", families.ENGINE)
def test_each_family_equals_plain_vllm(family: str, stubs: Path, tmp_path: Path) -> None:
    done = template().run(f"{__name__}:check", family, str(tmp_path), str(stubs))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("family", families.NIGHTLY)
def test_each_further_family_equals_plain_vllm(family: str, stubs: Path, tmp_path: Path) -> None:
    done = template().run(f"{__name__}:check", family, str(tmp_path), str(stubs))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr

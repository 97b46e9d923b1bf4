"""Writes the table of architectures in docs/models.md from vLLM's registry and our code.

    python -m tests.architectures

For each architecture that takes pictures: its processor in vLLM, its level
(`server.engine.vllm_adapter.levels`), its token rule (`server.engine.token_rules`), and its tests.
"""

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from server.engine.vllm_adapter import plugin

plugin.make_torchvision_importable()  # before vLLM's models import it

from vllm.model_executor.models.registry import ModelRegistry  # noqa: E402
from vllm.multimodal.processing import (  # noqa: E402
    BaseMultiModalProcessor,
    BaseProcessingInfo,
)

from server.engine import token_rules  # noqa: E402
from server.engine.vllm_adapter import levels  # noqa: E402
from tests import families  # noqa: E402

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- architectures: python -m tests.architectures -->", "<!-- end -->"

_IMAGES = ("image", "vision_chunk")
# The rules of `token_rules`, in words.
_RULES = {
    "_qwen": "native resolution",
    "_pixtral": "native resolution, row breaks",
    "_mistral3": "native resolution, row breaks",
    "_mistral_format": "native resolution, row breaks",
    "_fixed": "fixed",
    "_llava_next": "grids of tiles (AnyRes)",
    "_llava_onevision": "grids of tiles (AnyRes)",
    "_internvl": "tiles and a thumbnail",
    "_internvl_chat": "tiles and a thumbnail",
    "_idefics": "tiles and a view of the whole",
    "_gemma3": "one view, and crops with pan-and-scan",
}


class Row(NamedTuple):
    """One architecture that takes pictures."""

    architecture: str
    processor: str
    level: str
    rule: str
    tested: str


@functools.cache
def rows() -> list[Row]:
    """All architectures that take pictures, by name."""
    return [row for name in sorted(_multimodal()) for row in _rows(name)]


def _multimodal() -> list[str]:
    registry = importlib.import_module("vllm.model_executor.models.registry")
    return list(registry._MULTIMODAL_MODELS)


def _rows(architecture: str) -> Iterator[Row]:
    module, name = _place(architecture)
    model = _loaded(module, name)
    if model is None:
        if _shows_pictures(module):
            yield Row(architecture, "not in this build", "", "", _tested(architecture, ""))
        return
    for info, processor in _classes(model):
        if set(_IMAGES) & set(_modalities(info)):
            builder = token_rules.builder_of(info, processor)
            rule = "measured" if builder is None else _RULES[builder.__name__]
            own = processor.__name__
            yield Row(architecture, own, _level(processor), rule, _tested(architecture, own))


def _loaded(module: str, name: str) -> Any:
    """The model's class; None if it, or its processor, comes with vLLM's builds for GPUs only."""
    try:
        model = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    return model if hasattr(model, "_processor_factory") else None


def _shows_pictures(module: str) -> bool:
    """Whether the files of a module that cannot be used here handle pictures."""
    found = importlib.util.find_spec(module)
    assert found is not None
    places = found.submodule_search_locations or []
    files = [file for place in places for file in Path(place).rglob("*.py")]
    return any('"image"' in file.read_text() for file in files or [Path(str(found.origin))])


def _place(architecture: str) -> tuple[str, str]:
    """The module and the name of the model's class."""
    found: Any = ModelRegistry.models[architecture]
    return found.module_name, found.class_name


def _classes(model: Any) -> Iterator[tuple[type, type]]:
    """The classes of the processor's info and of the processor; several for a model that has them
    for several kinds of checkpoints."""
    factories = model._processor_factory
    infos = _made(factories.info, BaseProcessingInfo)
    return zip(infos, _made(factories.processor, BaseMultiModalProcessor), strict=True)


def _made(factory: Any, wanted: type) -> list[type]:
    """The classes that a factory makes: itself, or that of a generic one with its arguments, or
    those that a function names."""
    if not inspect.isfunction(factory):
        return [factory if inspect.isclass(factory) else factory.__origin__]
    names = (factory.__globals__.get(name) for name in factory.__code__.co_names)
    return [kind for kind in names if inspect.isclass(kind) and issubclass(kind, wanted)]


def _level(processor: type) -> str:
    most = levels.images_apart(processor)
    if not most:
        return levels.level(processor)
    return f"{levels.level(processor)} up to {most} image{'s' * (most > 1)}, then decoded"


def _modalities(info: type) -> Iterator[str]:
    """What `get_supported_mm_limits` may return, from its code: it runs only with a checkpoint."""
    for kind in info.__mro__:
        method = vars(kind).get("get_supported_mm_limits")
        if method is None:
            continue
        yield from _texts(method.__code__)
        if "super" not in method.__code__.co_names:
            return


def _texts(code: CodeType | tuple[Any, ...]) -> Iterator[str]:
    for constant in code.co_consts if isinstance(code, CodeType) else code:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | CodeType):
            yield from _texts(constant)


def _tested(architecture: str, processor: str) -> str:
    """The most that a checkpoint of it goes through. Where families share an architecture, one that
    the processor is named after counts alone."""
    names = [name for name, of in families.ARCHITECTURES.items() if of == architecture]
    names = [name for name in names if processor.lower().startswith(name)] or names
    if any(name in families.ENGINE for name in names):
        return "engine"
    if any(name in families.NIGHTLY for name in names):
        return "engine, nightly"
    return "processor" if names else "none"


# ---------------------------------------------------------------------- the page


def table() -> str:
    """The table, as it stands in the page."""
    head = ("Architecture", "vLLM's processor", "Level", "Token rule", "Tested")
    lines = [head, ("---",) * len(head)]
    lines += [(f"`{row[0]}`", f"`{row[1]}`" if row.level else row[1], *row[2:]) for row in rows()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def written(page: str) -> str:
    """`page` with the table in its place."""
    place = re.compile(re.escape(BEGIN) + r"\n.*?" + re.escape(END), re.DOTALL)
    assert place.search(page), f"{PAGE} has no place for the table"
    return place.sub(lambda _: f"{BEGIN}\n\n{table()}\n{END}", page)


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()

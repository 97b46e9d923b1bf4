"""All that is private of vLLM's multimodal processors, and the types that they take and give."""

import contextvars
import math
from concurrent.futures import Executor
from typing import Any

import torch
from PIL import Image

from server.request import context as requests
from server.request.groups import prefixed

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def tensor(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> torch.Tensor:
    """A tensor over shared memory; it keeps `buffer` alive."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    flat = torch.frombuffer(buffer, dtype=_DTYPES[dtype], count=count, offset=offset)
    return flat.view(shape)


def blank(size: tuple[int, int]) -> Image.Image:
    """A picture that has a size and no pixels: all that prompt updates ask for."""
    image = Image.Image()
    image._size = size
    image._mode = "RGB"
    return image


def name_by_group(processor: Any) -> None:
    """Let the names that vLLM's `processor` gives to items be those of the group of API keys that
    the current request belongs to (see `send.keep_in_group`)."""
    hashes_of = processor._get_mm_hashes

    def named(inputs: Any) -> dict[str, list[str]]:
        hashes, group = hashes_of(inputs), requests.current().group
        return {kind: [prefixed(name, group) for name in names] for kind, names in hashes.items()}

    processor._get_mm_hashes = named


def carry_context(executor: Executor) -> None:
    """Let what is submitted to `executor` run in the context of its caller."""
    submit: Any = executor.submit

    def submit_in_context(work: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(contextvars.copy_context().run, work, *args, **kwargs)

    executor.submit = submit_in_context  # type: ignore[method-assign]

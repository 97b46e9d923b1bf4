"""What comes out of the image pool, in the types that vLLM and its processors take."""

import math
from typing import Any

import torch
from PIL import Image

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

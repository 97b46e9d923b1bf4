"""What a request asks of the boxes and points in its answer (`include_grounding`)."""

from dataclasses import dataclass, replace
from typing import Any

from server.errors import ClientError

_OPTION = "include_grounding"
_MAX_SCALE = 1e6
_MAX_IMAGE = 1 << 16
# Models that write bare numbers in pixels of the processed picture. All others that ground their
# answers write thousandths, or a notation that tells the range.
_IN_PIXELS = frozenset({"qwen2_5_vl"})


@dataclass(frozen=True)
class GroundingOptions:
    """How places in an answer are read.

    Attributes:
        scale: the range of numbers whose notation does not tell it: 1000 for thousandths of the
            picture; None for pixels of the processed picture.
        image: the index of the picture that the answer is about, in the order of the prompt.
    """

    scale: float | None = 1000
    image: int = 0


BY_DEFAULT = GroundingOptions()


def of_model(model_type: str) -> GroundingOptions:
    """The defaults for a model, by the `model_type` of its configuration."""
    return GroundingOptions(None if model_type in _IN_PIXELS else 1000)


def grounding_of(value: Any, defaults: GroundingOptions) -> GroundingOptions | None:
    """The options of `include_grounding`: a boolean, or an object with `scale` and `image`; None if
    it is not asked for.

    Raises:
        ClientError: the value is neither; `param` names it.
    """
    if value is None or value is False:
        return None
    if value is True:
        return defaults
    if not isinstance(value, dict):
        raise ClientError(f"{_OPTION} must be a boolean or an object", param=_OPTION)
    options = defaults
    for name, given in value.items():
        if name not in ("scale", "image"):
            message = f"{_OPTION} takes only scale and image"
            raise ClientError(message, param=_OPTION)
        if name == "scale":
            options = replace(options, scale=_scale(given))
        elif type(given) is int and 0 <= given < _MAX_IMAGE:
            options = replace(options, image=given)
        else:
            message = "image must be the index of a picture, from 0"
            raise ClientError(message, param=f"{_OPTION}.image")
    return options


def _scale(given: Any) -> float | None:
    if given == "pixels":
        return None
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if is_number and 0 < given <= _MAX_SCALE:
        return float(given)
    message = f'scale must be "pixels" or a number above 0, at most {_MAX_SCALE:g}'
    raise ClientError(message, param=f"{_OPTION}.scale")


def check_image(options: GroundingOptions | None, images: int) -> None:
    """Raises ClientError if a request with this many `images` does not have the one that is asked
    for."""
    if options is not None and options.image and options.image >= images:
        raise ClientError(
            f"image must be the index of one of the {images} pictures", param=f"{_OPTION}.image"
        )

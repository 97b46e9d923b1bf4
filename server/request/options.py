"""What a media part asks for beside its bytes.

An image: `detail`, `max_tokens`, `frames`; a file: `pages`, `include_text`; a video: `fps`,
`num_frames`, `max_frames`, `start`, `end`, `max_tokens`.
"""

from collections.abc import Mapping
from typing import Any, get_args

from server.errors import ClientError
from server.imaging.encoded import ImageOptions
from server.imaging.sampling import SamplingOptions
from server.imaging.tokens import Detail

OPTIONS = ("detail", "max_tokens", "frames", "pages", "include_text")
VIDEO_OPTIONS = ("fps", "num_frames", "max_frames", "start", "end", "max_tokens")
_MAX_PAGES = 10_000
_MAX_FRAMES = 1 << 16
_MAX_FPS = 1000
_MAX_SECONDS = 1e7

Frames = tuple[int, ...] | int | None


def image_options(given: Mapping[str, Any], paths: Mapping[str, str]) -> ImageOptions:
    """`detail`, which may name a policy, and `max_tokens` of `given`; `paths` has the place of each
    option in the request.

    Raises:
        ClientError: a value that the option does not take; `param` names it.
    """
    policy = given.get("detail")
    if policy in ("trim", "salient"):
        return ImageOptions(max_tokens=_max_tokens(given, paths), reduction=policy)
    return ImageOptions(_detail(given, paths), _max_tokens(given, paths))


def frames_of(given: Mapping[str, Any], paths: Mapping[str, str]) -> Frames:
    """`frames`: how many frames of an animation, spread over all of it, or which, from 0.

    Raises:
        ClientError: the value is neither; `param` names it.
    """
    value = given.get("frames")
    if value is None or is_positive(value):
        return value
    if isinstance(value, list) and value and all(map(_is_index, value)):
        return tuple(value)
    must = "must be a positive integer or a list of frame numbers from 0"
    raise _wrong("frames", must, paths)


def pages_of(given: Mapping[str, Any], paths: Mapping[str, str]) -> tuple[int, ...] | None:
    """`pages` as numbers from 0, of a list of numbers from 1 or of a text such as "1-3,7".

    Raises:
        ClientError: the value is neither; `param` names it.
    """
    value = given.get("pages")
    if value is None:
        return None
    texts = [str(item) for item in value] if isinstance(value, list) else str(value).split(",")
    pages: list[int] = []
    for text in texts:
        first, dash, last = (piece.strip() for piece in text.partition("-"))
        bounds = (first, last if dash else first)
        if not all(bound.isascii() and bound.isdigit() and len(bound) <= 6 for bound in bounds):
            raise _wrong("pages", 'must be page numbers from 1, such as "1-3,7"', paths)
        start, end = int(bounds[0]), int(bounds[1])
        if start < 1 or end < start:
            raise _wrong("pages", 'must be page numbers from 1, such as "1-3,7"', paths)
        pages += range(start - 1, min(end, start + _MAX_PAGES))
        if len(pages) > _MAX_PAGES:
            raise _wrong("pages", f"must name at most {_MAX_PAGES} pages", paths)
    return tuple(pages)


def includes_text(given: Mapping[str, Any], paths: Mapping[str, str]) -> bool:
    """`include_text`: whether the text of a PDF's pages is shown too.

    Raises:
        ClientError: it is not a boolean; `param` names it.
    """
    value = given.get("include_text", False)
    if not isinstance(value, bool):
        raise _wrong("include_text", "must be a boolean", paths)
    return value


def sampling_options(given: Mapping[str, Any], paths: Mapping[str, str]) -> SamplingOptions:
    """`VIDEO_OPTIONS` of `given`; `paths` has the place of each option in the request.

    Raises:
        ClientError: a value that the option does not take, or several options that exclude each
            other; `param` names one.
    """
    counts = [name for name in ("fps", "num_frames", "max_frames") if name in given]
    if len(counts) > 1:
        raise _wrong(counts[1], f"cannot stand beside {counts[0]}", paths)
    for name in ("num_frames", "max_frames"):
        value = given.get(name)
        if value is not None and not (is_positive(value) and value <= _MAX_FRAMES):
            raise _wrong(name, f"must be an integer from 1 to {_MAX_FRAMES}", paths)
    fps = _number("fps", given, paths, _MAX_FPS)
    if fps == 0:
        raise _wrong("fps", "must be above 0", paths)
    start, end = (_number(name, given, paths, _MAX_SECONDS) for name in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise _wrong("end", "must be after start", paths)
    return SamplingOptions(
        fps,
        given.get("num_frames"),
        given.get("max_frames"),
        start,
        end,
        _max_tokens(given, paths),
    )


def _number(
    name: str, given: Mapping[str, Any], paths: Mapping[str, str], most: float
) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise _wrong(name, f"must be a number from 0 to {most:g}", paths)
    return float(value)


def is_positive(value: Any) -> bool:
    """Whether `value` is an integer above 0; JSON's `true` is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_index(value: Any) -> bool:
    return is_positive(value) or (value == 0 and not isinstance(value, bool))


def _detail(given: Mapping[str, Any], paths: Mapping[str, str]) -> Detail:
    value = given.get("detail")
    if value is None:
        return "auto"
    if value == "original":  # OpenAI's name for all the detail that there is
        return "high"
    for detail in get_args(Detail):
        if value == detail:
            found: Detail = detail
            return found
    must = "must be one of 'auto', 'low', 'high', 'original', 'trim' and 'salient'"
    raise _wrong("detail", must, paths)


def _max_tokens(given: Mapping[str, Any], paths: Mapping[str, str]) -> int | None:
    value = given.get("max_tokens")
    if value is not None and not is_positive(value):
        raise _wrong("max_tokens", "must be a positive integer", paths)
    return value


def _wrong(option: str, must: str, paths: Mapping[str, str]) -> ClientError:
    return ClientError(f"{option} {must}", param=paths[option])

"""What one request says about its images, and what becomes of them.

There is one `ImageRequest` a request. The body reader enters it, the loader and the renderer find
it by `current`, and the answer is completed from it.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field

from server.ingest.encoded import EncodedImage


@dataclass(frozen=True)
class ShownImage:
    """An image as the model sees it. Sizes are (width, height) in pixels.

    `size` is the upright original. `processed` is what the encoder gets, and covers `region` of the
    original: (left, top, right, bottom) in its pixels, which reaches beyond it where the processor
    pads. `tokens` are visual tokens. `cached`: the features were there already.
    """

    size: tuple[int, int]
    tokens: int
    processed: tuple[int, int] | None
    region: tuple[float, float, float, float] | None
    frame: int = 0
    cached: bool = False


@dataclass
class ImageRequest:
    """`body` is the request without its long `payloads`, which stand in it as tokens.

    `parts` are (path, name) of each image or file part: where the client wrote it, and the URL or
    uuid by which the loader will be asked for it. `prepared` are images that were made while the
    body was read: pages of a file, frames of an animation. `shown` is filled by the renderer, in
    the order of the prompt; `encoded` tells, in the same order, for which of them the encoder ran,
    and is None until the end of the answer, or where nobody tells.
    """

    body: bytes = b""
    payloads: dict[str, memoryview] = field(default_factory=dict)
    parts: list[tuple[str, str]] = field(default_factory=list)
    prepared: dict[str, EncodedImage] = field(default_factory=dict)
    max_image_tokens: int | None = None
    include_details: bool = False
    shown: list[ShownImage] = field(default_factory=list)
    encoded: list[bool] | None = None

    def path_of(self, name: str) -> str | None:
        """Where the client wrote the part that is called `name`, or of which `name` is made:
        "messages[0].content[1].image_url"."""
        for path, own_name in self.parts:
            if own_name and name.endswith(own_name):
                return path
        return None


_current: ContextVar[ImageRequest | None] = ContextVar("saccade_image_request", default=None)


def enter(request: ImageRequest) -> None:
    """Make `request` the one that the current task serves."""
    _current.set(request)


def current() -> ImageRequest:
    """The request that the current task serves; an empty one outside of any."""
    return _current.get() or ImageRequest()

"""What servers return, as typed objects. Unknown fields are kept: see pydantic's `model_extra`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from saccade_client import boxes
from saccade_client.boxes import Box, Point


class _Object(BaseModel):
    model_config = ConfigDict(extra="allow")


class Usage(_Object):
    """Tokens of a request and its answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None

    @property
    def image_tokens(self) -> int | None:
        """Tokens of all pictures, which count as prompt tokens; None if the server does not say."""
        return (self.prompt_tokens_details or {}).get("image_tokens")

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the server's cache had."""
        return (self.prompt_tokens_details or {}).get("cached_tokens") or 0


class ShownImage(_Object):
    """A picture as the model saw it.

    `width` and `height` are those of the caller's picture, upright, in pixels, whatever size was
    sent. `region` is the part of it that the model saw: left, top, right, bottom. `tokens` and the
    processed size are None if the server does not tell. `cached` is "none", "features" or
    "embedding".
    """

    width: int
    height: int
    region: tuple[float, float, float, float]
    processed_width: int | None = None
    processed_height: int | None = None
    tokens: int | None = None
    cached: str | None = None
    frame: int | None = None


class Grounded(_Object):
    """A box or a point that the server has read in an answer (`include_grounding`).

    `box` (left, top, right, bottom) or `point` (x, y) is in pixels of the caller's picture with the
    index `image`; both are None if the server does not know how the picture was processed.
    `numbers` are the model's, in the range `scale`, or "pixels" of the processed picture. `choice`
    is the index of the answer's choice.
    """

    choice: int = 0
    image: int = 0
    label: str | None = None
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    numbers: tuple[float, ...] = ()
    scale: float | Literal["pixels"] | None = None


class Message(_Object):
    """The model's message."""

    role: str = "assistant"
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(_Object):
    """One of the answers to a request."""

    index: int = 0
    message: Message
    finish_reason: str | None = None


class Answer(_Object):
    """The answer to a question. `images` are the pictures as the model saw them, in the order of
    the prompt; empty if they are unknown. `grounding` has what the server was asked to read; None
    without `include_grounding`."""

    id: str = ""
    model: str = ""
    choices: list[Choice]
    usage: Usage | None = None
    images: list[ShownImage] = Field(default_factory=list, alias="image_details")
    grounding: list[Grounded] | None = None
    _headers: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].message.content or "" if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended: "stop", "length", "tool_calls"..."""
        return self.choices[0].finish_reason if self.choices else None

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the response, such as `x-request-id`, `server-timing` and
        `x-ratelimit-remaining-requests`."""
        return self._headers

    def boxes(self, scale: float | None = 1000, image: int = 0) -> list[Box]:
        """The boxes in the text, in pixels of the picture with the index `image`. `scale` is the
        range of the model's coordinates; see `boxes.to_original`.

        Raises:
            IndexError: nothing is known about this picture.
        """
        shown = self.images[image]
        return [boxes.to_original(box, shown, scale) for box in boxes.find(self.text)]

    def points(self, scale: float | None = 1000, image: int = 0) -> list[Point]:
        """As `boxes`, for the points in the text."""
        shown = self.images[image]
        found = boxes.find_points(self.text)
        return [boxes.point_to_original(point, shown, scale) for point in found]


class Delta(_Object):
    """What a chunk of a stream adds to the model's message."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChunkChoice(_Object):
    """What a chunk adds to one of the answers."""

    index: int = 0
    delta: Delta = Field(default_factory=Delta)
    finish_reason: str | None = None


class Chunk(_Object):
    """An event of a stream. The last one has the `usage`, and no choices."""

    id: str = ""
    model: str = ""
    choices: list[ChunkChoice] = Field(default_factory=list)
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What it adds to the text of the first choice."""
        return "".join(each.delta.content or "" for each in self.choices if each.index == 0)

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended, in the chunk that ends it."""
        return next((each.finish_reason for each in self.choices if each.index == 0), None)


class ImageCost(_Object):
    """What a picture would cost: `tokens` of the prompt, and `kv_bytes` of the KV cache."""

    width: int
    height: int
    processed_width: int | None = None
    processed_height: int | None = None
    region: tuple[float, float, float, float] | None = None
    tokens: int
    kv_bytes: int


class ModelCard(_Object):
    """A model that the server offers."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None


class UploadedFile(_Object):
    """A file in the server's store. Times are Unix times in seconds."""

    id: str
    bytes: int
    filename: str
    purpose: str
    created_at: int
    expires_at: int | None = None

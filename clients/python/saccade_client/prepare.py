"""From messages with pictures to the messages that are sent.

media loaded -> sizes -> the server's cost of each -> resized where the model sees no more -> parts
"""

import base64
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachetools import LRUCache
from PIL import Image

from saccade_client import affinity, shrink
from saccade_client.answers import Grounded, ImageCost, ShownImage
from saccade_client.flow import Flow, Work
from saccade_client.media import Detail, Document, Media, Picture, Video, media, rendered
from saccade_client.shrink import Encoded, Size

# A message of the API, whose content may be a list of texts, media, and parts of the API.
MessageLike = Mapping[str, Any]
Part = dict[str, Any]
# Size, `detail` and `max_tokens` of a picture.
Asked = tuple[Size, Detail | None, int | None]
# Pictures that share a budget of tokens.
Group = tuple[tuple[Asked, ...], int | None]
# Asks the server what pictures cost, together with a budget.
AskCosts = Callable[[Sequence[Asked], int | None], Flow[list[ImageCost]]]

# Smaller files are sent as they are: asking would take longer.
_MIN_BYTES = 64 * 1024
# Resizing must take away at least a fifth of the pixels, or it only loses quality.
_MAX_KEPT = 0.8
_REMEMBERED = 10_000


@dataclass
class Prepared:
    """Messages that are ready to be sent, but for the pictures that the server has already."""

    messages: list[dict[str, Any]]
    is_saccade: bool
    # Each medium with its place: a list of parts, and the index in it.
    placed: list[tuple[list[Any], int, Media]] = field(default_factory=list)
    encoded: dict[int, Encoded] = field(default_factory=dict)  # by the index in `placed`
    session: str | None = None  # see `affinity`

    def names(self) -> frozenset[str]:
        """Names of the pictures that have bytes and are one image to the model. Takes time."""
        return frozenset(
            encoded.name
            for index, encoded in self.encoded.items()
            if not _is_several(self.placed[index][2])
        )

    def written(
        self, names: frozenset[str] = frozenset(), known: frozenset[str] = frozenset()
    ) -> list[dict[str, Any]]:
        """The messages as they are sent. Pictures in `names` are sent with their names, those in
        `known` without their data. Takes time."""
        for index, (parts, at, medium) in enumerate(self.placed):
            encoded = self.encoded.get(index)
            name = encoded.name if encoded is not None and names else None
            part = _part(medium, encoded, name if name in names else None, name in known)
            parts[at] = part if self.is_saccade else _of_other_servers(part)
        return self.messages

    def images(self, details: Sequence[ShownImage] | None) -> list[ShownImage]:
        """The server's `details` (None: it sends none), in pixels of the caller's pictures."""
        pictures = [
            (self.encoded.get(index), medium)
            for index, (_, _, medium) in enumerate(self.placed)
            if not isinstance(medium, Video)
        ]
        if details is None:
            sizes = [encoded.size if encoded else None for encoded, _ in pictures]
            return [_whole(size) for size in sizes if size] if all(sizes) else []
        several = len(details) - sum(not _is_several(medium) for _, medium in pictures)
        found: list[ShownImage] = []
        for encoded, medium in pictures:
            count = several if _is_several(medium) else 1
            shown = details[len(found) : len(found) + count]
            found += [_in_original(each, encoded) for each in shown]
        return found + list(details[len(found) :])


class Preparer:
    """Prepares messages. Remembers what the server has said about sizes."""

    def __init__(self, quality: int) -> None:
        self._quality = quality
        # By the sizes and options of pictures that were asked about together.
        self._targets: LRUCache[Group, tuple[Size | None, ...] | None] = LRUCache(_REMEMBERED)
        self._lock = threading.Lock()

    def prepare(
        self,
        messages: Sequence[MessageLike],
        *,
        is_saccade: bool,
        ask: AskCosts | None,
        budget: int | None = None,
    ) -> Flow[Prepared]:
        """Load all media and resize pictures to what the model sees of them. `ask` is None if they
        are to keep their sizes; `budget` is the request's for the tokens of all of them.

        Raises:
            UnusableMedia: a medium cannot be read.
        """
        prepared: Prepared = yield Work(lambda: _loaded(messages, is_saccade))
        pictures = {
            index: medium
            for index, (_, _, medium) in enumerate(prepared.placed)
            if isinstance(medium, Picture) and isinstance(medium.source, bytes | Image.Image)
        }
        sizes: dict[int, Size | None] = yield Work(
            lambda: {index: shrink.upright_size(medium) for index, medium in pictures.items()}
        )
        # Otherwise it would be unclear which detail of an answer belongs to which picture.
        is_clear = sum(_is_several(medium) for _, _, medium in prepared.placed) <= 1
        is_clear = is_clear and not any(medium.is_reduced for medium in pictures.values())
        targets: dict[int, Size | None] = {}
        if ask is not None and is_clear and any(map(_is_large, pictures.values())):
            asked = {
                index: (size, pictures[index].detail, pictures[index].max_tokens)
                for index, size in sizes.items()
                if size and (budget or _is_large(pictures[index]))
            }
            # A budget is shared out among all pictures, so all sizes must be known.
            if budget is None or len(asked) == len(prepared.placed):
                found = yield from self._targets_of(tuple(asked.values()), ask, budget)
                targets = dict(zip(asked, found, strict=True))
        prepared.encoded = yield Work(
            lambda: {
                index: shrink.encoded(medium, sizes[index], targets.get(index), self._quality)
                for index, medium in pictures.items()
            }
        )
        return prepared

    def _targets_of(
        self, pictures: tuple[Asked, ...], ask: AskCosts, budget: int | None
    ) -> Flow[list[Size | None]]:
        """The size at which the model sees each picture, if that is smaller and costs the same."""
        groups: list[Group] = [((each,), None) for each in pictures]
        if budget is not None:
            groups = [(pictures, budget)]
        with self._lock:
            found = {group: self._targets.get(group) for group in groups}
        if new := [group for group, targets in found.items() if targets is None]:
            flat = [each for members, _ in new for each in members]
            costs = yield from ask(flat, budget)
            wanted = [_target(cost) for cost in costs]
            again = yield from ask(
                [(to or each[0], *each[1:]) for each, to in zip(flat, wanted, strict=True)], budget
            )
            is_same = [
                to is None or (_whole_at(small) == to and small.tokens == cost.tokens)
                for to, cost, small in zip(wanted, costs, again, strict=True)
            ]
            answers = iter(zip(wanted, is_same, strict=True))
            for group in new:
                pairs = [next(answers) for _ in group[0]]
                is_kept = all(same for _, same in pairs)
                found[group] = tuple(to if is_kept else None for to, _ in pairs)
            with self._lock:
                self._targets.update((group, found[group]) for group in new)
        return [target for group in groups for target in found[group] or ()]


def _loaded(messages: Sequence[MessageLike], is_saccade: bool) -> Prepared:
    """Copies of the messages, with the media of their contents read."""
    prepared = Prepared([], is_saccade)
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) or not isinstance(content, Sequence):
            prepared.messages.append(dict(message))
            continue
        parts: list[Any] = []
        for item in content:
            if isinstance(item, Mapping):
                parts.append(item)
                prepared.session = prepared.session or affinity.of_part(item)
            elif isinstance(item, str):
                parts.append({"type": "text", "text": item})
            else:
                for medium in _accepted(media(item), is_saccade):
                    prepared.session = prepared.session or affinity.of_medium(medium)
                    prepared.placed.append((parts, len(parts), medium))
                    parts.append(None)
        prepared.messages.append({**message, "content": parts})
    return prepared


def _accepted(medium: Media, is_saccade: bool) -> Sequence[Media]:
    """The medium in a form that the server takes: others than Saccade take no PDF."""
    return rendered(medium) if isinstance(medium, Document) and not is_saccade else [medium]


def _part(medium: Media, encoded: Encoded | None, name: str | None, is_known: bool) -> Part:
    """The part of a message. `name` is the picture's; one that the server knows has no data."""
    if isinstance(medium, Document):
        file: Part = {"file_id": medium.file_id}
        if medium.data is not None:
            url = _data_url("application/pdf", medium.data)
            file = {"filename": medium.name, "file_data": url}
        return {"type": "file", "file": file} | ({"pages": medium.pages} if medium.pages else {})
    if isinstance(medium, Video):
        source = medium.source
        url = source if isinstance(source, str) else _data_url(medium.media_type, source)
        return {"type": "video_url", "video_url": {"url": url}}
    options = {"detail": medium.detail, "max_tokens": medium.max_tokens, "frames": medium.frames}
    holder: Part = {key: value for key, value in options.items() if value is not None}
    if medium.file_id is not None:
        holder["file_id"] = medium.file_id
    elif medium.url is not None:
        holder["url"] = medium.url
    elif encoded is not None and not is_known:
        holder["url"] = _data_url(encoded.media_type, encoded.data)
    named = {"uuid": name} if name else {}
    return {"type": "image_url", "image_url": holder, **named}


def _of_other_servers(part: Part) -> Part:
    """The part without the options that only Saccade takes."""
    holder = part.get("image_url")
    if holder is None:
        return part
    own: tuple[str, ...] = ("max_tokens", "frames")
    if holder.get("detail") in ("trim", "salient"):
        own = (*own, "detail")
    return {**part, "image_url": {key: holder[key] for key in holder if key not in own}}


def _is_large(picture: Picture) -> bool:
    source = picture.source
    if isinstance(source, Image.Image):
        return source.width * source.height >= _MIN_BYTES
    return isinstance(source, bytes) and len(source) >= _MIN_BYTES and picture.frames is None


def _is_several(medium: Media) -> bool:
    """Whether the medium may be several images to the model."""
    return isinstance(medium, Document) or (
        isinstance(medium, Picture) and (medium.frames is not None or medium.detail == "salient")
    )


def _target(cost: ImageCost) -> Size | None:
    """The size at which the model sees the whole picture, if that is much smaller."""
    whole = _whole_at(cost)
    is_small = whole and whole[0] * whole[1] <= _MAX_KEPT * cost.width * cost.height
    return whole if is_small else None


def _whole_at(cost: ImageCost) -> Size | None:
    """The processed size; None if the model sees only a part of the picture, or nobody knows."""
    if cost.processed_width is None or cost.processed_height is None:
        return None
    is_whole = cost.region == (0, 0, cost.width, cost.height)
    return (cost.processed_width, cost.processed_height) if is_whole else None


def _whole(size: Size) -> ShownImage:
    return ShownImage(width=size[0], height=size[1], region=(0, 0, *size))


def _in_original(shown: ShownImage, encoded: Encoded | None) -> ShownImage:
    """`shown` in pixels of the caller's picture."""
    if encoded is None or encoded.size is None or encoded.size == encoded.sent_size:
        return shown
    width, height = encoded.size
    across, down = width / shown.width, height / shown.height
    left, top, right, bottom = shown.region
    region = (left * across, top * down, right * across, bottom * down)
    return shown.model_copy(update={"width": width, "height": height, "region": region})


def in_original(
    places: Sequence[Grounded], sent: Sequence[ShownImage], images: Sequence[ShownImage]
) -> list[Grounded]:
    """`places` in the pictures `sent`, in pixels of the caller's, `images`."""
    return [
        _scaled(place, sent[place.image], images[place.image]) if place.image < len(sent) else place
        for place in places
    ]


def _scaled(place: Grounded, sent: ShownImage, image: ShownImage) -> Grounded:
    across, down = image.width / sent.width, image.height / sent.height
    box, point = place.box, place.point
    if box is not None:
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    if point is not None:
        point = (point[0] * across, point[1] * down)
    return place.model_copy(update={"box": box, "point": point})


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

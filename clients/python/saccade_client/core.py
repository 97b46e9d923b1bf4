"""What the client does, as flows: the parts that `Client` and `AsyncClient` share."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from cachetools import LRUCache
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from saccade_client import DEFAULT_URL, __version__, affinity, shrink
from saccade_client.answers import Answer, ImageCost, ModelCard, UploadedFile
from saccade_client.errors import (
    ApiError,
    NotFound,
    RateLimited,
    SaccadeError,
    ServerError,
    UnexpectedAnswer,
    UnusableMedia,
)
from saccade_client.flow import Flow, Send, Work, delivered
from saccade_client.media import Document, Media, MediaSource, Picture, media
from saccade_client.prepare import Asked, MessageLike, Prepared, Preparer, in_original

# Picture names that the server is known to have, and costs asked for at a time.
_NAMES, _COSTS_AT_A_TIME = 100_000, 1000
_OPENAI_HOST = "api.openai.com"

_COSTS = TypeAdapter(list[ImageCost])
_MODELS = TypeAdapter(list[ModelCard])


@dataclass(frozen=True)
class Settings:
    """How a client works.

    `base_url` is the API's, with `/v1` (default: OPENAI_BASE_URL, or http://127.0.0.1:8000/v1),
    `api_key` is sent as bearer token (default: OPENAI_API_KEY), `model` is used where a call names
    none (default: the first that the server lists). `resize` sends pictures as small as the model
    will see them, in JPEG of `quality` if they were lossy; `reuse` sends a picture once, and then
    its name. Both need Saccade as the server. `retries` limits further attempts, `timeout_s` the
    time for an answer in seconds. `headers` are added to every request.
    """

    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    resize: bool = True
    reuse: bool = True
    quality: int = 90
    retries: int = 4
    timeout_s: float = 600.0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Conversation:
    """The messages so far. Each question is added with its answer, so ask one at a time."""

    system: str | None = None
    messages: list[MessageLike] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system is not None and not self.messages:
            self.messages.append({"role": "system", "content": self.system})


@dataclass
class Started:
    """A request that the server is answering, or has answered."""

    response: httpx.Response
    messages: Sequence[MessageLike]
    prepared: Prepared
    conversation: Conversation | None

    def answer(self, document: Mapping[str, Any] | None = None) -> Answer:
        """The answer, which `document` has if it was streamed, with its pictures in the caller's
        pixels. It becomes part of the conversation. Raises UnexpectedAnswer if it is none."""
        document = _read(self.response) if document is None else document
        details = document.get("image_details")
        try:
            answer = Answer.model_validate({**document, "image_details": details or []})
        except ValidationError as error:
            raise UnexpectedAnswer(f"the answer is no chat completion: {error}") from None
        sent = answer.images
        answer.images = self.prepared.images(sent if details is not None else None)
        if answer.grounding and details is not None:
            answer.grounding = in_original(answer.grounding, sent, answer.images)
        answer._headers = self.response.headers
        if self.conversation is not None:
            said: dict[str, Any] = {"role": "assistant", "content": answer.text}
            if answer.choices and (calls := answer.choices[0].message.tool_calls):
                said["tool_calls"] = calls
            self.conversation.messages = [*self.messages, said]
        return answer


class Core:
    """All flows of a client of one server."""

    def __init__(self, settings: Settings) -> None:
        given = settings.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
        self.settings = settings
        self.url = given.rstrip("/")
        self._root = self.url.removesuffix("/v1")
        self._host = httpx.URL(self.url).host
        key = settings.api_key or os.environ.get("OPENAI_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise SaccadeError("the API key has characters that cannot be sent")
        self.headers = {
            "User-Agent": f"saccade-client/{__version__}",
            "X-Request-Timeout": f"{settings.timeout_s:g}",
            **({"Authorization": f"Bearer {key}"} if key else {}),
            **settings.headers,
        }
        self._preparer = Preparer(settings.quality)
        self._model = settings.model
        self._is_saccade: bool | None = False if self._host == _OPENAI_HOST else None
        self._lock = threading.Lock()
        self._known: LRUCache[str, bool] = LRUCache(_NAMES)
        self._uploads: LRUCache[str, str] = LRUCache(_NAMES)

    # ------------------------------------------------------------------ the server

    def is_saccade(self) -> Flow[bool]:
        """Whether the server is Saccade; asked until it says so or not, and never of OpenAI."""
        if self._is_saccade is None:
            try:
                response = yield from self._get(f"{self._root}/version")
                self._is_saccade = "saccade" in response.json()
            except ApiError as error:
                if isinstance(error, RateLimited | ServerError):
                    return False
                self._is_saccade = False
            except (ValueError, TypeError):
                self._is_saccade = False
        return self._is_saccade

    def models(self) -> Flow[list[ModelCard]]:
        """The models that the server offers."""
        response = yield from self._get(f"{self.url}/models")
        return _MODELS.validate_python(_read(response).get("data"))

    def model(self, given: str | None = None) -> Flow[str]:
        """The model to ask."""
        if given or self._model:
            return given or self._model or ""
        if self._host == _OPENAI_HOST:
            raise SaccadeError("name a model: the server has many")
        models = yield from self.models()
        if not models:
            raise SaccadeError("the server has no model")
        self._model = models[0].id
        return self._model

    # ------------------------------------------------------------------ questions

    def ask(self, text: str, sources: Sequence[MediaSource], **more: Any) -> Flow[Started]:
        """`start` with a question about media, after the messages of the conversation."""
        loaded: list[Media] = yield Work(lambda: [media(source) for source in sources])
        conversation: Conversation | None = more["conversation"]
        before = conversation.messages if conversation else []
        message = {"role": "user", "content": [*loaded, text] if loaded else text}
        return (yield from self.start([*before, message], **more))

    def start(
        self,
        messages: Sequence[MessageLike],
        *,
        options: Mapping[str, Any],
        conversation: Conversation | None = None,
        stream: bool = False,
    ) -> Flow[Started]:
        """Send messages. Raises ApiError, ConnectionFailed, TimedOut, UnusableMedia."""
        options = {name: value for name, value in options.items() if value is not None}
        if options.pop("stream", stream) and not stream:
            raise SaccadeError("`stream` is no option of a call that waits for the whole answer")
        budget = options.get("max_image_tokens")
        prepared = yield from self.prepare(messages, budget)
        body = {"model": (yield from self.model(options.get("model"))), **options}
        if prepared.is_saccade:
            body.setdefault("include_image_details", True)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reuse = prepared.is_saccade and self.settings.reuse
        names: frozenset[str] = (yield Work(prepared.names)) if reuse else frozenset()
        with self._lock:
            known = frozenset(name for name in names if name in self._known)
        try:
            response = yield from self._converse(prepared, body, names, known)
        except ApiError as error:
            if error.code != "unknown_image" or not known:
                raise
            response = yield from self._converse(prepared, body, names, frozenset())
        with self._lock:
            self._known.update(dict.fromkeys(names, True))
        return Started(response, messages, prepared, conversation)

    def messages(
        self, messages: Sequence[MessageLike], budget: int | None = None
    ) -> Flow[list[dict[str, Any]]]:
        """Messages for another client of the API, with their media loaded and resized."""
        prepared = yield from self.prepare(messages, budget)
        written: list[dict[str, Any]] = yield Work(prepared.written)
        return written

    def prepare(self, messages: Sequence[MessageLike], budget: int | None = None) -> Flow[Prepared]:
        """Load and resize the pictures of messages."""
        has_media = any(_has_media(message) for message in messages)
        is_saccade = has_media and (yield from self.is_saccade())
        ask = self._costs if is_saccade and self.settings.resize else None
        return (
            yield from self._preparer.prepare(
                messages, is_saccade=is_saccade, ask=ask, budget=budget
            )
        )

    def _converse(
        self,
        prepared: Prepared,
        body: Mapping[str, Any],
        names: frozenset[str],
        known: frozenset[str],
    ) -> Flow[httpx.Response]:
        def written() -> bytes:
            return json.dumps({**body, "messages": prepared.written(names, known)}).encode()

        content = yield Work(written)
        headers = self._routing(prepared.session)
        return (yield from self._post("chat/completions", content, headers, "stream" in body))

    def _routing(self, session: str | None) -> dict[str, str]:
        """The session, for routers; none for OpenAI, which has no use for it."""
        is_openai = self._host == _OPENAI_HOST
        return {} if is_openai else affinity.headers(session, self.settings.headers)

    # ------------------------------------------------------------------ costs and uploads

    def costs(
        self, sources: Sequence[MediaSource], budget: int | None = None
    ) -> Flow[list[ImageCost]]:
        """What pictures would cost, in their order; a picture that Pillow cannot read is uploaded
        for it."""
        loaded: list[Media] = yield Work(lambda: [media(source) for source in sources])
        messages = [{"role": "user", "content": loaded}]
        prepared = yield from self._preparer.prepare(messages, is_saccade=True, ask=None)
        return (yield from self._costs_of(prepared, budget))

    def _costs_of(self, prepared: Prepared, budget: int | None) -> Flow[list[ImageCost]]:
        """Costs of pictures: by size where it is known, or else by their headers on the server."""
        sized: list[Asked] = []
        for index, (_, _, medium) in enumerate(prepared.placed):
            encoded = prepared.encoded.get(index)
            if not isinstance(medium, Picture) or encoded is None or encoded.size is None:
                break
            sized.append((encoded.size, medium.detail, medium.max_tokens))
        else:
            return (yield from self._costs(sized, budget))

        def written() -> bytes:
            body = {"messages": prepared.written(), "max_image_tokens": budget}
            return json.dumps(body).encode()

        response = yield from self._post("images/tokens", (yield Work(written)))
        return _COSTS.validate_python(_read(response).get("data"))

    def _costs(self, pictures: Sequence[Asked], budget: int | None) -> Flow[list[ImageCost]]:
        found: list[ImageCost] = []
        at_a_time = _COSTS_AT_A_TIME if budget is None else len(pictures)
        for start in range(0, len(pictures), at_a_time):
            images = [
                {"width": width, "height": height, "detail": detail or "auto", "max_tokens": most}
                for (width, height), detail, most in pictures[start : start + at_a_time]
            ]
            content = json.dumps({"images": images, "max_image_tokens": budget}).encode()
            response = yield from self._post("images/tokens", content)
            found += _COSTS.validate_python(_read(response).get("data"))
        return found

    def upload(self, source: MediaSource, lifetime_s: int | None) -> Flow[Picture | Document]:
        """Put a picture or a PDF into the server's store, once, and refer to it from now on."""
        medium: Media = yield Work(lambda: media(source))
        if isinstance(medium, Document):
            data, name, purpose = medium.data, medium.name, "user_data"
        elif isinstance(medium, Picture) and isinstance(medium.source, bytes | Image.Image):
            encoded = yield Work(lambda: shrink.encoded(medium, None, None, self.settings.quality))
            data, name, purpose = encoded.data, "picture", "vision"
        else:
            raise UnusableMedia("only pictures and PDFs can be uploaded")
        if data is None:
            return medium
        key = hashlib.sha256(data).hexdigest()
        with self._lock:
            file_id = self._uploads.get(key)
        if file_id is None or not (yield from self._has_file(file_id)):
            form: dict[str, Any] = {"purpose": (None, purpose), "file": (name, data)}
            if lifetime_s is not None:
                form["expires_after[anchor]"] = (None, "created_at")
                form["expires_after[seconds]"] = (None, str(lifetime_s))
            send = Send("POST", f"{self.url}/files", files=form)
            response = yield from delivered(send, self.settings.retries)
            file_id = UploadedFile.model_validate(_read(response)).id
            with self._lock:
                self._uploads[key] = file_id
        if isinstance(medium, Document):
            return Document(None, medium.pages, file_id, medium.name)
        return Picture(None, file_id, medium.detail, medium.max_tokens, medium.frames)

    def _has_file(self, file_id: str) -> Flow[bool]:
        try:
            yield from self._get(f"{self.url}/files/{file_id}")
        except NotFound:
            return False
        return True

    def delete(self, file_id: str) -> Flow[None]:
        """Delete an upload."""
        send = Send("DELETE", f"{self.url}/files/{file_id}")
        yield from delivered(send, self.settings.retries)

    # ------------------------------------------------------------------ requests

    def metrics(self) -> Flow[str]:
        """The text of `/metrics`."""
        return (yield from self._get(f"{self._root}/metrics")).text

    def _get(self, url: str) -> Flow[httpx.Response]:
        return (yield from delivered(Send("GET", url), self.settings.retries))

    def _post(
        self,
        path: str,
        content: bytes,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
    ) -> Flow[httpx.Response]:
        """Post JSON to a route of the API."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        send = Send("POST", f"{self.url}/{path}", content, headers, stream=stream)
        return (yield from delivered(send, self.settings.retries))


def _read(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UnexpectedAnswer(f"the answer of {response.url.path} is not a JSON object")
    return document


def _has_media(message: MessageLike) -> bool:
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return False
    return not all(isinstance(item, str | Mapping) for item in content)

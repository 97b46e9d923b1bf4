"""The kinds of requests of a soak, in all dialects."""

import base64
import http
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from benchmarks.soak_client import Client

MODEL = "saccade-tiny"
_MAX_TOKENS = 8
_PATHS = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
# Origins that hang, lie or send too much.
_HOSTILE_ORIGINS = (
    *("/silent", "/drip", "/drip-head", "/endless", "/reset-in-body", "/garbage", "/gzip-bomb"),
    *("/redirect-loop", "/announces-too-much?size=9999999999", "/html", "/half-a-head"),
)
_REFUSED: tuple[tuple[str, bytes], ...] = (
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}'),
    ("/v1/chat/completions", b"[" * 200_000),
    ("/v1/chat/completions", b'{"messages": [' + b"{}," * 5000 + b"{}]}"),
    ("/v1/chat/completions", b'{"messages": "none", "max_tokens": "many"}'),
    ("/v1/chat/completions", json.dumps({"messages": [], "top_k": 2**70}).encode()),
    ("/v1/responses", b'{"input": [{"role": "user", "content": [{"type": "image_pil"}]}]}'),
    ("/v1/responses", b'{"input": {"a": {"b": 1e400}}}'),
    ("/v1/messages", b'{"messages": [{"role": "user", "content": [{"type": 1}]}]}'),
    ("/v1/messages", b"\xff\xfe"),
    ("/tokenize", b'{"prompt": 1}'),
    ("/v1/completions", b'{"prompt": {"a": 1}}'),
    ("/v1/no-such-route", b"{}"),
)


def _request(dialect: str, question: str, urls: list[str], **more: Any) -> dict[str, Any]:
    """A body that asks about the pictures at `urls`, which may be data URLs."""
    shown: list[dict[str, Any]]
    if dialect == "responses":
        shown = [{"type": "input_image", "image_url": url} for url in urls]
        content = [*shown, {"type": "input_text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return {"model": MODEL, "input": turns, "max_output_tokens": _MAX_TOKENS, **more}
    if dialect == "messages":
        shown = [{"type": "image", "source": _source(url)} for url in urls]
    else:
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    turns = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    return {"model": MODEL, "messages": turns, "max_tokens": _MAX_TOKENS, **more}


def _source(url: str) -> dict[str, str]:
    """The source of Anthropic's dialect."""
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    head, _, data = url.partition(",")
    media_type = head.removeprefix("data:").removesuffix(";base64")
    return {"type": "base64", "media_type": media_type, "data": data}


def _url(data: bytes, media_type: str = "image/jpeg") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _ask(
    client: Client, urls: list[str], *, dialect: str = "", leave: str = "", **more: Any
) -> tuple[int, bytes]:
    dialect = dialect or client.rng.choice(list(_PATHS))
    stream = leave == "stream" or client.rng.random() < 0.5
    body = _request(dialect, client.question(), urls, stream=stream, **more)
    return client.post(_PATHS[dialect], body, leave)


def _text(client: Client) -> tuple[int, bytes]:
    return _ask(client, [])


def _photo(size: str) -> Callable[[Client], tuple[int, bytes]]:
    return lambda client: _ask(client, [_url(client.files.photo(client.rng, size))])


def _pages(client: Client) -> tuple[int, bytes]:
    pages = [client.files.page(client.rng) for _ in range(2)]
    return _ask(client, [_url(page, "image/png") for page in pages])


def _fetched(client: Client) -> tuple[int, bytes]:
    size = client.rng.choice(("small", "small", "fullhd", "12mp"))
    kept, number = client.rng.choice((0, 1)), client.rng.randrange(200)
    return _ask(client, [client.origin.url(f"/picture?size={size}&kept={kept}&n={number}")])


def _hostile_fetch(client: Client) -> tuple[int, bytes]:
    return _ask(client, [client.origin.url(client.rng.choice(_HOSTILE_ORIGINS))])


def _document(client: Client) -> tuple[int, bytes]:
    return _ask(client, [_url(client.files.pdf(), "application/pdf")], dialect="chat")


def _animation(client: Client) -> tuple[int, bytes]:
    part = {
        "type": "image_url",
        "image_url": {"url": _url(client.files.gif(), "image/gif")},
        "frames": 2,
    }
    return _parts(client, part)


def _clip(client: Client) -> tuple[int, bytes]:
    url = _url(client.files.clip(client.rng), "video/mp4")
    return _parts(client, {"type": "video_url", "video_url": {"url": url}})


def _parts(client: Client, *parts: dict[str, Any]) -> tuple[int, bytes]:
    content = [*parts, {"type": "text", "text": client.question()}]
    messages = [{"role": "user", "content": content}]
    body = {"model": MODEL, "messages": messages, "max_tokens": _MAX_TOKENS}
    return client.post(_PATHS["chat"], body)


def _upload(client: Client) -> tuple[int, bytes]:
    """Upload a picture, ask about it, delete it."""
    form = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        b"%b\r\n--x--\r\n"
    ) % client.files.photo(client.rng, "small")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, body = client.exchange("POST", "/v1/files", form, headers)
    if status != http.HTTPStatus.OK:
        return status, body
    file_id = json.loads(body)["id"]
    part = {"type": "input_image", "file_id": file_id}
    turns = [{"role": "user", "content": [part]}]
    request = {"model": MODEL, "input": turns, "max_output_tokens": _MAX_TOKENS}
    answer = client.post(_PATHS["responses"], request)
    deleted = client.exchange("DELETE", f"/v1/files/{quote(file_id)}", b"", {})
    return answer if deleted[0] == http.HTTPStatus.OK else deleted


def _other_routes(client: Client) -> tuple[int, bytes]:
    url = _url(client.files.photo(client.rng, "small"))
    tokenized = _request("chat", client.question(), [url])
    del tokenized["max_tokens"]
    completion = {"model": MODEL, "prompt": client.question(), "max_tokens": _MAX_TOKENS}
    sizes = {"images": [{"width": client.rng.randrange(50, 4000), "height": 1000}]}
    path, body = client.rng.choice((
        ("/tokenize", tokenized),
        ("/v1/completions", completion),
        ("/v1/images/tokens", sizes),
    ))  # fmt: skip
    return client.post(path, body)


def _scrape(client: Client) -> tuple[int, bytes]:
    path = client.rng.choice(("/metrics", "/health", "/ready", "/v1/models", "/version"))
    return client.exchange("GET", path, b"", {})


def _hostile_file(client: Client) -> tuple[int, bytes]:
    return _ask(client, [_url(client.files.hostile(client.rng))], dialect="chat")


def _refused(client: Client) -> tuple[int, bytes]:
    return client.post(*client.rng.choice(_REFUSED))


def _leaver(client: Client) -> tuple[int, bytes]:
    size = client.rng.choice(("small", "fullhd", "12mp"))
    if client.rng.random() < 0.3:
        urls = [client.origin.url(client.rng.choice(("/silent", "/drip", f"/picture?size={size}")))]
    else:
        urls = [_url(client.files.photo(client.rng, size))]
    more = {"ignore_eos": True} if client.rng.random() < 0.5 else {}
    leave = client.rng.choice(("body", "waiting", "stream"))
    return _ask(client, urls, dialect="chat", leave=leave, **more)


@dataclass(frozen=True)
class Kind:
    """`statuses` are those that a request may get besides 503."""

    weight: float
    run: Callable[[Client], tuple[int, bytes]]
    statuses: tuple[int, ...] = (200,)


_REFUSALS = (400, 404, 408, 413, 415, 422)
KINDS = {
    "text": Kind(15, _text),
    "small photo": Kind(20, _photo("small")),
    "full-HD photo": Kind(8, _photo("fullhd")),
    "12 MP photo": Kind(4, _photo("12mp")),
    "two pages": Kind(4, _pages),
    "fetched photo": Kind(8, _fetched),
    "PDF": Kind(5, _document),
    "animation": Kind(3, _animation),
    "video": Kind(2, _clip),
    "upload": Kind(3, _upload),
    "other routes": Kind(5, _other_routes),
    "scrape": Kind(3, _scrape),
    "client that leaves": Kind(8, _leaver),
    "hostile file": Kind(6, _hostile_file, (200, *_REFUSALS)),
    "hostile origin": Kind(3, _hostile_fetch, _REFUSALS),
    "refused body": Kind(5, _refused, _REFUSALS),
}

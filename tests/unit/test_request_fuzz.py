"""Random bodies in every dialect are read, loaded and rewritten, or refused."""

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.errors import ClientError
from server.ingest.load import MediaLoader
from tests import pictures
from tests.media import CHAT, media_loader, pdf, read

IMAGE = pictures.data_url(pictures.encode(pictures.shape("red")), "image/png")
PDF = pictures.data_url(pdf((50, 50), (60, 60)), "application/pdf")
LONG = "data:image/png;base64," + "A" * 20_000
ROUTES = (
    CHAT, "/v1/messages", "/v1/responses", "/v1/images/tokens", "/pooling", "/score",
)  # fmt: skip

TYPES = st.sampled_from((
    "text", "image_url", "input_image", "image_file", "file", "input_file", "video_url",
    "audio_url", "input_audio", "image", "document", "tool_result", "image_embeds", "refusal",
    "message", "reasoning", "function_call_output", "base64", "url", "content", "unknown",
))  # fmt: skip
KEYS = st.sampled_from((
    "type", "text", "image_url", "url", "file", "file_data", "file_id", "file_url", "image_file",
    "video_url", "audio_url", "input_audio", "data", "source", "content", "title", "detail",
    "max_tokens", "frames", "pages", "uuid", "role", "output", "summary", "status",
))  # fmt: skip
# None of these URLs causes a request outside the process.
TEXTS = st.sampled_from((
    IMAGE, IMAGE.partition(",")[2], PDF, LONG, "", "\0", "data:", "data:,%", "data:;base64,@",
    "data:video/jpeg;base64,/9j/,/9j/", "http://", "http://\0/", "http://[::1", "http://127.0.0.1/",
    "file:///etc/passwd", "file://\0", "low", "1-3", "9" * 50, "saccade-payload-0", "../file",
))  # fmt: skip
NUMBERS = st.integers() | st.sampled_from((10**18, 10**30, 10**400, -1e308)) | st.floats(0, 9)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | TYPES | st.text(max_size=5)


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    typed = st.builds(lambda kind, more: {**more, "type": kind}, TYPES, objects(inner))
    return typed | objects(inner) | st.lists(inner, max_size=3)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(KEYS, inner, max_size=4)


VALUES = st.recursive(LEAVES, grown, max_leaves=12)
PARTS = st.lists(st.builds(lambda kind, more: {"type": kind, **more}, TYPES, objects(VALUES)))
MESSAGES = st.lists(
    st.builds(lambda parts, more: {"content": parts, **more}, PARTS, objects(LEAVES))
)
DOCUMENTS = st.dictionaries(
    st.sampled_from((
        "messages", "input", "inputs", "data_1", "queries", "documents", "images", "system",
        "max_image_tokens", "include_image_details", "stream", "stream_options",
    )),
    MESSAGES | PARTS | VALUES,
    max_size=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def loader() -> MediaLoader:
    return media_loader()


def has_path(document: Any, path: str) -> bool:
    """Whether `path` without its last step exists in `document`."""
    for step in re.findall(r"\w+|\[\d+\]", path.rpartition(".")[0]):
        key = int(step[1:-1]) if step[0] == "[" else step
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def refusal(loader: MediaLoader, body: bytes, route: str) -> ClientError | None:
    try:
        found = read(body, route)
        asyncio.run(loader.load(found.context))
        written = found.rewritten()
    except ClientError as error:
        return error
    json.loads(written)
    assert all(ref.source is None for ref in found.context.media)
    return None


@settings(max_examples=150, deadline=None)
@example({"messages": [{"content": [{"type": "input_audio"}]}]}, "/v1/chat/completions")
@given(DOCUMENTS, st.sampled_from(ROUTES))
def test_any_body_is_read_or_refused_with_a_client_error(
    loader: MediaLoader, document: Any, route: str
) -> None:
    error = refusal(loader, json.dumps(document).encode(), route)
    assert error is None or error.param is None or has_path(document, error.param)

"""Valid requests of every route, and bodies in which one or two places of them are wrong."""

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests import pictures

Place = tuple[str | int, ...]

_IMAGE = pictures.data_url(pictures.encode(pictures.shape("red", size=(32, 32))))
_DATA = _IMAGE.partition(",")[2]
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"enum": [1, 2]}},
    "required": ["a"],
}
_FUNCTION = {"name": "f", "description": "d", "parameters": _SCHEMA}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_CHAT_TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": _IMAGE, "detail": "low"}, "uuid": "u1"},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "nothing"},
    {"role": "user", "content": "And now?"},
]
_RESPONSE_TURNS: list[dict[str, Any]] = [
    {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is it?"},
            {"type": "input_image", "image_url": _IMAGE, "detail": "low"},
        ],
    },
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "nothing"},
]
_MESSAGE_TURNS: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?", "cache_control": {"type": "ephemeral"}},
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": _DATA},
            },
        ],
    },
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": "x"}}],
    },
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "c1",
                "content": [{"type": "text", "text": "nothing"}],
            }
        ],
    },
]
_SAMPLING: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "logit_bias": {"5": 1},
    "presence_penalty": 0.1, "stream": True, "stream_options": {"include_usage": True}, "user": "u",
    "priority": 0,
}  # fmt: skip

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": _CHAT_TURNS, "max_tokens": 1, "logprobs": True,
        "top_logprobs": 1, "tools": [{"type": "function", "function": _FUNCTION}],
        "tool_choice": "auto", "parallel_tool_calls": True, "chat_template_kwargs": {"x": 1},
        "mm_processor_kwargs": {}, "metadata": {"a": "b"}, **_SAMPLING,
    },
    "/v1/chat/completions/batch": {
        "messages": [[{"role": "user", "content": "Hello"}]] * 2, "max_tokens": 1, "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
    },
    "/v1/responses": {
        "input": _RESPONSE_TURNS, "max_output_tokens": 1, "instructions": "Be brief.",
        "stream": True, "temperature": 0.5, "top_p": 0.9, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}},
        "tools": [{"type": "function", **_FUNCTION}], "tool_choice": "auto", "store": False,
        "metadata": {"a": "b"}, "include": [], "truncation": "disabled", "top_logprobs": 1,
    },
    "/v1/messages": {
        "messages": _MESSAGE_TURNS, "max_tokens": 1, "stream": True, "temperature": 0.5,
        "system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["x"], "top_k": 5,
        "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "auto"}, "metadata": {"user_id": "u"},
        "thinking": {"type": "disabled"},
    },
    "/v1/messages/count_tokens": {
        "messages": _MESSAGE_TURNS, "system": "Be brief.",
        "tools": [{"name": "f", "input_schema": _SCHEMA}],
    },
    "/v1/completions": {
        "prompt": ["Hello", "you"], "max_tokens": 1, "logprobs": 1, "echo": True,
        "structured_outputs": {"choice": ["a", "b"]}, **_SAMPLING,
    },
    "/tokenize": {
        "messages": _CHAT_TURNS, "add_generation_prompt": True, "return_token_strs": True,
        "tools": [{"type": "function", "function": _FUNCTION}], "continue_final_message": False,
    },
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/images/tokens": {
        "images": [{"width": 640, "height": 480, "detail": "low"}, {"width": 99, "height": 9}],
        "max_image_tokens": 100,
    },
    "/v1/systemone": {
        "state": {"a": 1}, "instructions": "Be brief.", "chat_template_kwargs": {},
        "questions": {"q": {"type": "boolean", "instructions": "Is it?"}},
    },
    "/generative_scoring": {
        "query": "Hello", "items": ["a", "b"], "label_token_ids": [1, 2], "apply_softmax": True,
        "item_first": False,
    },
    "/invocations": {"messages": _CHAT_TURNS, "max_tokens": 1, **_SAMPLING},
}  # fmt: skip

# Without these the engine would work for long, which is not wrong.
_KEPT = ("max_tokens", "max_output_tokens", "n", "min_tokens", "ignore_eos", "model")
_NAMES = ("type", "text", "content", "url", "$ref", "x", "", "\0", "\ud800", "__class__", "a" * 300)
_NUMBERS = (0, -1, 1, 2**31, 2**53, 2**63, -(2**63) - 1, 2**64, 2**70, 10**400, 0.5, 1e308, -0.0)
_TEXTS = ("", "x", "\0", "\ud800", "\udfff\ud83d", "a" * 5000, "auto", "low", "1", "null", "\u202e")
# Texts that Python's JSON reader accepts and JSON does not have, and repeated names.
_RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-0", '{"a": 1, "a": 2}', "01", "'x'", "\x00")
_MARK = "\ue000"

_LEAVES = st.none() | st.booleans() | st.sampled_from(_NUMBERS) | st.sampled_from(_TEXTS)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A request for the route at `path` in which one or two places are wrong."""
    document = json.loads(json.dumps({"model": "saccade-tiny", **REQUESTS[path]}))
    raw = []
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        places = [place for place in _places(document) if place[0] not in _KEPT]
        raw.append(_mutate(draw, document, draw(st.sampled_from(places))))
    text = json.dumps(document)
    for replacement in filter(None, raw):
        text = text.replace(json.dumps(_MARK), replacement, 1)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any, at: Place = ()) -> Iterator[Place]:
    """All places below `value`, as their keys and indices."""
    steps: Any = ()
    if isinstance(value, dict):
        steps = value.items()
    elif isinstance(value, list):
        steps = enumerate(value)
    for step, inner in steps:
        yield (*at, step)
        yield from _places(inner, (*at, step))


def _mutate(draw: st.DrawFn, document: Any, place: Place) -> str | None:
    """Change the value at `place`; returns the text that replaces the mark that was left there."""
    parent = document
    for step in place[:-1]:
        parent = parent[step]
    step = place[-1]
    match draw(st.sampled_from(("replace", "replace", "raw", "delete", "repeat", "wrap", "add"))):
        case "replace":
            parent[step] = draw(_VALUES)
        case "raw":
            parent[step] = _MARK
            return draw(st.sampled_from(_RAW))
        case "delete":
            del parent[step]
        case "repeat":
            parent[step] = [parent[step]] * draw(st.sampled_from((2, 100)))
        case "wrap":
            _wrap(draw, parent, step)
        case "add" if isinstance(parent[step], dict):
            parent[step][draw(st.sampled_from(_NAMES))] = draw(_VALUES)
        case "add":
            parent[step] = {draw(st.sampled_from(_NAMES)): parent[step]}
    return None


def _wrap(draw: st.DrawFn, parent: Any, step: str | int) -> None:
    """Nest the value in lists or objects."""
    depth, in_lists = draw(st.sampled_from((1, 2, 60, 120, 400))), draw(st.booleans())
    for _ in range(depth):
        parent[step] = [parent[step]] if in_lists else {"a": parent[step]}

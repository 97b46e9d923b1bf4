"""Random bodies for the routes of conversations: an answer or a clear refusal, never a 5xx, a hang
or the text of a library.

    pytest tests/server/test_fuzz.py --fuzz-examples 20000
"""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import answers

MODEL = "saccade-tiny"
USER: Any = {"role": "user", "content": "Hello"}
# Small, because the engine answers the valid ones.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 1},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 1},
    "/v1/messages": {"messages": [USER], "max_tokens": 1},
}
WAIT_S = 60
DEFAULT_EXAMPLES = 150

NUMBERS = st.sampled_from((0, 1, -1, 2, 2**31, 2**40, 2**63, -(2**63), 2**64, 2**70, 0.5, 1e308))
TEXTS = st.sampled_from(("", "x", "\0", "a" * 300, "auto", "function", "json_schema", "text", "#"))
KEYS = st.sampled_from((
    "type", "name", "function", "parameters", "schema", "json_schema", "format", "role", "content",
    "text", "tool_calls", "arguments", "id", "input", "properties", "$ref", "items", "enum",
    "pattern", "regex", "grammar", "choice", "json", "structural_tag", "effort", "x",
))  # fmt: skip
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
SCHEMAS = VALUES | st.sampled_from((
    {"$ref": "#"}, {"type": "x"}, {"enum": [2**70]}, {"type": "string", "pattern": "("},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"type": "array", "minItems": 9},
))  # fmt: skip
GRAMMARS = st.sampled_from(("root ::= root", 'root ::= "a"', "start: start", "root ::= ((", "x"))
PATTERNS = st.sampled_from(("(", "a{0,100000}", "[^\\s\\S]", "(?<=a)b", "(a*)*", "\\", "a|b"))
CALLS = st.fixed_dictionaries(
    {"id": LEAVES, "type": TEXTS},
    optional={"function": st.fixed_dictionaries({"name": LEAVES, "arguments": VALUES}) | VALUES},
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(("text", "input_text", "tool_use", "tool_result", "refusal", "x"))},
    optional={"text": VALUES, "id": LEAVES, "name": LEAVES, "input": VALUES, "content": VALUES},
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system", "tool", "developer", "x"))},
    optional={
        "content": st.lists(PARTS, max_size=2) | LEAVES,
        "tool_calls": st.lists(CALLS, max_size=2) | VALUES,
        "tool_call_id": LEAVES,
        "name": LEAVES,
    },
)
TOOLS = st.fixed_dictionaries(
    {"type": TEXTS},
    optional={
        "name": LEAVES,
        "input_schema": SCHEMAS,
        "parameters": SCHEMAS,
        "function": st.fixed_dictionaries({"name": LEAVES, "parameters": SCHEMAS}),
    },
)
FORMATS = st.fixed_dictionaries(
    {"type": st.sampled_from(("json_schema", "json_object", "text", "x"))},
    optional={
        "json_schema": st.fixed_dictionaries({"name": TEXTS, "schema": SCHEMAS}),
        "schema": SCHEMAS,
        "name": TEXTS,
    },
)
CONSTRAINTS = st.fixed_dictionaries(
    {},
    optional={
        "json": SCHEMAS,
        "grammar": GRAMMARS,
        "regex": PATTERNS,
        "choice": st.lists(LEAVES, max_size=3),
        "json_object": LEAVES,
        "structural_tag": TEXTS,
    },
)
# Fields with a form of their own; the others get any value.
SHAPED: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(TURNS, max_size=3),
    "input": st.lists(TURNS, max_size=3) | VALUES,
    "tools": st.lists(TOOLS, max_size=2),
    "response_format": FORMATS,
    "text": st.fixed_dictionaries({"format": FORMATS}),
    "output_config": st.fixed_dictionaries({"format": FORMATS}),
    "structured_outputs": CONSTRAINTS,
    "vllm_xargs": st.dictionaries(st.sampled_from(("kv_transfer_params", "x")), VALUES, max_size=2),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(("messages", "tools", "documents", "tokenize", "x")), VALUES, max_size=2
    ),
}
# More answers or tokens than one take long and are not wrong.
KEPT = ("model", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "min_tokens")


@pytest.fixture(scope="module")
def fields(http: httpx.Client) -> dict[str, list[str]]:
    """The fields of the body of each route, by the server's own description."""
    described = http.get("/openapi.json").json()
    found = {}
    for path in BODIES:
        content = described["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        found[path] = [
            field for field in described["components"]["schemas"][name]["properties"]
            if field not in KEPT
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("path", BODIES)
def test_random_bodies_are_answered_or_refused(
    http: httpx.Client, fields: dict[str, list[str]], path: str, request: pytest.FixtureRequest
) -> None:
    wanted = request.config.getoption("--fuzz-examples")

    @given(st.data())
    @settings(
        max_examples=wanted,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=wanted == DEFAULT_EXAMPLES,
    )
    def sends(data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(fields[path]), max_size=3, unique=True))
        values = {name: data.draw(SHAPED.get(name, VALUES), label=name) for name in chosen}
        body = {"model": MODEL, **BODIES[path], **values}
        answer = http.post(path, json=body, timeout=WAIT_S)
        answers.check(path, answer.status_code, answer.text)

    sends()
    assert http.get("/ready").status_code == 200

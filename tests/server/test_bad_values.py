"""Values that vLLM, or a library below it, fails on: a 400 that names the field."""

import json
from typing import Any

import httpx
import pytest

MODEL = "saccade-tiny"
USER: Any = {"role": "user", "content": "Hello"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, TOKENIZE = "/v1/responses", "/v1/messages", "/tokenize"
INVOCATIONS = "/invocations"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 4, "temperature": 1},
    COMPLETIONS: {"prompt": "Hello", "max_tokens": 4, "temperature": 1},
    RESPONSES: {"input": "Hello", "max_output_tokens": 4, "temperature": 1},
    MESSAGES: {"messages": [USER], "max_tokens": 4, "temperature": 1},
    TOKENIZE: {"messages": [USER]},
    INVOCATIONS: {"messages": [USER], "max_tokens": 4},
}
# Texts that only a library writes.
FOREIGN = ("Traceback", "pydantic", "object has no", "object is not", ".py", "/project/", "jinja")
BEYOND = 2**70


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def calls(function: Any) -> list[Any]:
    called = {"id": "x", "type": "function", "function": function}
    return [USER, {"role": "assistant", "tool_calls": [called]}]


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


# (path, values, the path of the wrong one).
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "top_k": (CHAT, {"top_k": BEYOND}, "top_k"),
    "top_k of messages": (MESSAGES, {"top_k": BEYOND}, "top_k"),
    "top_k of responses": (RESPONSES, {"top_k": -BEYOND}, "top_k"),
    "stream_interval": (COMPLETIONS, {"stream_interval": BEYOND}, "stream_interval"),
    "repetition count": (
        CHAT,
        {"repetition_detection": {"max_pattern_size": 2, "min_count": BEYOND}},
        "repetition_detection.min_count",
    ),
    "integer in a schema": (
        CHAT,
        {"response_format": schema({"enum": [1, BEYOND]})},
        "response_format.json_schema.schema.enum[1]",
    ),
    "top_k below -1": (CHAT, {"top_k": -2}, "top_k"),
    "min_p": (CHAT, {"min_p": 2}, "min_p"),
    "temperature": (CHAT, {"temperature": -1}, "temperature"),
    "too many answers": (CHAT, {"n": 129}, "n"),
    "transfer parameters": (
        CHAT,
        {"vllm_xargs": {"kv_transfer_params": 1}},
        "kv_transfer_params",
    ),
    "grammar without a text": (
        CHAT,
        {"structured_outputs": {"grammar": "root ::= root"}},
        "structured_outputs",
    ),
    "grammar with a dead end": (
        COMPLETIONS,
        {"structured_outputs": {"grammar": 'root ::= "a" more\nmore ::= more'}},
        "structured_outputs",
    ),
    "regular expression without a text": (
        RESPONSES,
        {"structured_outputs": {"regex": r"[^\s\S]"}},
        "structured_outputs",
    ),
    "invalid regular expression": (
        CHAT,
        {"structured_outputs": {"regex": "(?<=a)b"}},
        "structured_outputs",
    ),
    "schema that is itself": (CHAT, {"response_format": schema({"$ref": "#"})}, "response_format"),
    "text format that is itself": (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#"}}}},
        "text",
    ),
    "output format that is itself": (
        MESSAGES,
        {"output_config": {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}},
        "output_config",
    ),
    "schema with unknown types": (
        CHAT,
        {"response_format": schema({"type": "x"})},
        "response_format",
    ),
    "schema of 3,000 properties": (
        CHAT,
        {"response_format": schema(properties(3000))},
        "response_format",
    ),
    "schema as text of 3,000 properties": (
        CHAT,
        {"structured_outputs": {"json": json.dumps(properties(3000))}},
        "structured_outputs",
    ),
    "deep schema": (CHAT, {"response_format": schema(nested(70))}, "response_format"),
    "long schema": (CHAT, {"response_format": schema({"const": "x" * 70_000})}, "response_format"),
    "50,000 choices": (
        CHAT,
        {"structured_outputs": {"choice": [f"choice {n}" for n in range(50_000)]}},
        "structured_outputs",
    ),
    "many repetitions": (
        CHAT,
        {"structured_outputs": {"regex": "(a{0,100000}b)" + "(.{0,100000}c)" * 40}},
        "structured_outputs",
    ),
    "many long texts": (
        CHAT,
        {"response_format": schema({"anyOf": [{"type": "string", "maxLength": 9**9}] * 40})},
        "response_format",
    ),
    "deep grammar": (
        CHAT,
        {"structured_outputs": {"grammar": "root ::= " + "(" * 300 + '"a"' + ")" * 300}},
        "structured_outputs",
    ),
    "constraint of a wrong type": (CHAT, {"structured_outputs": 1}, "structured_outputs"),
    "tools of a wrong type": (RESPONSES, {"tools": 1}, "tools"),
    "tool call without arguments": (CHAT, {"messages": calls({"name": "f"})}, "messages"),
    "tool call of a wrong type": (CHAT, {"messages": calls(1)}, "messages"),
    "tool call with deep arguments": (
        CHAT,
        {"messages": calls({"name": "f", "arguments": "[" * 5000})},
        "messages",
    ),
    "tool call to tokenize": (
        TOKENIZE,
        {"messages": calls({"name": "f", "arguments": "[" * 5000})},
        "messages",
    ),
    "argument of the template": (CHAT, {"chat_template_kwargs": {"messages": 1}}, "messages"),
    "documents of the template": (CHAT, {"chat_template_kwargs": {"documents": 1}}, "messages"),
    "messages that are null": (INVOCATIONS, {"messages": None}, "messages"),
    "template of a wrong type": (TOKENIZE, {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_value_is_a_400_that_names_it(http: httpx.Client, case: str, streams: bool) -> None:
    path, values, param = CASES[case]
    body = {"model": MODEL, **BODIES[path], **values}
    if streams:
        if path == TOKENIZE:
            pytest.skip("it has no streams")
        body["stream"] = True
    answer = http.post(path, json=body)
    error = _error(answer)
    assert error["code"] == "invalid_request"
    assert error["param"] == param
    assert error["message"]
    assert not [text for text in FOREIGN if text in error["message"]]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("option", ["background", "truncation", "tools", "service_tier"])
def test_an_option_of_responses_that_is_null_has_its_default_or_is_refused(
    http: httpx.Client, option: str, streams: bool
) -> None:
    body = {"model": MODEL, **BODIES[RESPONSES], option: None, "stream": streams}
    answer = http.post(RESPONSES, json=body)
    if option in ("background", "truncation"):
        assert answer.status_code == 200
        assert "internal_error" not in answer.text
    else:
        assert _error(answer)["param"] == option


def test_the_server_still_answers_after_bad_values(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"model": MODEL, **BODIES[CHAT]})
    assert answer.status_code == 200
    assert http.get("/ready").status_code == 200


def test_a_lone_surrogate_is_refused(http: httpx.Client) -> None:
    for field in ("request_id", "bad_words", "user"):
        value = '["\\ud800"]' if field == "bad_words" else '"\\ud800"'
        body = json.dumps({"model": MODEL, **BODIES[CHAT]})[:-1] + f', "{field}": {value}}}'
        headers = {"Content-Type": "application/json"}
        answer = http.post(CHAT, content=body.encode(), headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_request"


def _error(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, or of the last event of a stream that says it."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        (event,) = [
            line for line in answer.text.splitlines() if '"error"' in line and "data:" in line
        ]
        found: dict[str, Any] = json.loads(event.removeprefix("data: "))["error"]
        return found
    assert answer.status_code == 400, answer.text
    body: dict[str, Any] = answer.json()["error"]
    return body

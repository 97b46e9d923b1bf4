"""Answers of all kinds, to compare servers and what is between them and their clients."""

import json
import re
from typing import Any

import httpx

from server.engine.arguments import DEMO_MODEL
from tests.pictures import encode, image_part, photo, shape, text_part, user

CHAT = "/v1/chat/completions"
FLAGS = (
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # A known beginning of a prompt changes the last bits of log-probabilities.
    "--no-enable-prefix-caching",
)
WHAT = text_part("What is in the image?")
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "green", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "report", "strict": True, "parameters": SCHEMA}}
LOOSE = {"type": "function", "function": {"name": "report", "parameters": SCHEMA}}
# What differs between two equal requests, or two configurations of vLLM.
IDS = re.compile(r'"(id|created|request_id|system_fingerprint)": ?("[^"]*"|\d+)')


def ask(client: httpx.Client, *parts: dict[str, Any], **options: Any) -> httpx.Response:
    body = {"model": "saccade-tiny", "messages": user(*parts), "temperature": 0, **options}
    return client.post(CHAT, json=body)


def blank_tokens() -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    every = range(tokenizer.get_vocab_size())
    return {str(token): -100 for token in every if not tokenizer.decode([token]).strip()}


def answers(client: httpx.Client, *, strict: bool = True) -> dict[str, str]:
    """The bodies of answers of all kinds, without what differs between two equal requests.

    `strict`: whether the tool is. The server needs `FLAGS`.
    """
    red, large = (image_part(encode(each)) for each in (shape("red"), photo((640, 480), 3)))
    named = {"type": "function", "function": {"name": "report"}}
    call = {
        "tools": [TOOL if strict else LOOSE],
        "tool_choice": named,
        "logit_bias": blank_tokens(),
        "max_tokens": 48,
    }
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    kinds: dict[str, dict[str, Any]] = {
        "picture": {"parts": [red, WHAT], "include_image_details": True},
        "pictures": {"parts": [large, red, WHAT], "logprobs": True, "top_logprobs": 3},
        "text": {"parts": [text_part("Hello")], "max_tokens": 24},
        "two": {"parts": [red, WHAT], "n": 2, "seed": 1, "temperature": 0.7},
        "stream": {"parts": [large, WHAT], **usage},
        "stop": {"parts": [red, WHAT], "stop": ["circle"]},
        "tool": {"parts": [red, WHAT], **call},
        "tool stream": {"parts": [red, WHAT], **call, **usage},
        "schema": {
            "parts": [red, WHAT],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True},
            },
        },
    }
    found = {}
    for name, options in kinds.items():
        answer = ask(client, *options.pop("parts"), **options)
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if not line.startswith(":")]
        found[name] = joined(lines) if "stream" in options else IDS.sub("", "\n".join(lines))
    return found


def joined(lines: list[str]) -> str:
    """What a stream says, however many tokens came in each of its events."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    said: dict[str, Any] = {"content": "", "arguments": "", "role": None, "names": [], "ends": []}
    for event in map(json.loads, events):
        said |= {"model": event["model"], "usage": event.get("usage")}
        for choice in event["choices"]:
            delta, end = choice["delta"], choice["finish_reason"]
            said["role"] = said["role"] or delta.get("role")
            said["content"] += delta.get("content") or ""
            said["ends"] += [end] if end else []
            for call in delta.get("tool_calls") or ():
                called = call["function"]
                said["names"] += [called["name"]] if called.get("name") else []
                said["arguments"] += called.get("arguments") or ""
    assert said["content"] or said["arguments"]
    return json.dumps(said)

"""The validation of a response's input in slices."""

import asyncio
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from server.http import fail_fast
from server.http.routes import validated
from server.http.validation import explained

ADAPTER: TypeAdapter[ResponsesRequest] = TypeAdapter(ResponsesRequest)
ADAPTER.validator = fail_fast.validator(ADAPTER)
ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "message", "role": "assistant", "id": "m", "status": "completed",
     "content": [{"type": "output_text", "text": "hello", "annotations": []}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "1"},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "so"}]},
]  # fmt: skip


def document(count: int) -> dict[str, Any]:
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    items = [ITEMS[number % len(ITEMS)] for number in range(count)]
    return {"input": items, "tools": tools, "tool_choice": "auto", "temperature": 0.5}


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_a_request_is_the_same_as_without_slices(count: int) -> None:
    expected = ADAPTER.validate_python(document(count))
    request = asyncio.run(validated(ADAPTER, document(count)))
    kinds = [type(item) for item in expected.input]
    assert [type(item) for item in request.input] == kinds
    names = {"request_id"}
    assert request.model_dump(exclude=names) == expected.model_dump(exclude=names)
    assert request.model_fields_set == expected.model_fields_set


def test_other_work_goes_on_between_slices() -> None:
    async def run() -> int:
        turns = 0
        validation = asyncio.create_task(validated(ADAPTER, document(1000)))
        while not validation.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(run()) > 1000 / 100


@pytest.mark.parametrize("wrong", [{"role": "user", "content": 5}, {"type": "nothing"}, 7])
def test_an_error_names_the_item_as_without_slices(wrong: Any) -> None:
    given = document(150)
    given["input"][130] = wrong
    with pytest.raises(ValidationError) as whole:
        ADAPTER.validate_python({**given, "input": list(given["input"])})
    in_body = [{**e, "loc": ("body", *e["loc"])} for e in whole.value.errors(include_url=False)]
    with pytest.raises(RequestValidationError) as sliced:
        asyncio.run(validated(ADAPTER, given))
    found = explained(sliced.value)
    assert found == explained(RequestValidationError(in_body, body=given))
    assert str(found[1]).startswith("input[130]")

"""Compatibility with the official OpenAI and Anthropic clients, and the routes besides chat."""

import asyncio
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer

from server.engine.arguments import DEMO_MODEL
from tests import pictures
from tests.conftest import Server
from tests.pictures import data_url, image_part, shape, text_part, user

MODEL = "saccade-tiny"
RED = pictures.encode(shape("red"))
# Large enough for its payload to be taken out of the body before parsing.
LARGE_BLUE = pictures.encode(pictures.photo((600, 400)), "PNG")
ASK: Any = user(image_part(RED), text_part("What is in the image?"))
ASK_TOKENS = 49 + 21  # the picture, plus the template and the question
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "report",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"color": {"type": "string", "enum": ["red", "green", "blue"]}},
            "required": ["color"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = TOOL["function"]["parameters"]


def test_a_sync_client_gets_the_answer_and_usage(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    assert answer.choices[0].message.content == "a red circle"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == ASK_TOKENS


def test_concurrent_async_requests_get_their_own_answers(async_client: AsyncOpenAI) -> None:
    async def ask(color: str) -> str | None:
        messages: Any = user(image_part(pictures.encode(shape(color))), ASK[0]["content"][1])
        answer = await async_client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0
        )
        return answer.choices[0].message.content

    async def all_of_them() -> list[str | None]:
        async with async_client:
            return await asyncio.gather(*map(ask, ("red", "green", "blue")))

    assert asyncio.run(all_of_them()) == ["a red circle", "a green circle", "a blue circle"]


def test_a_stream_ends_with_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "a red circle"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_n_returns_several_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, n=3, temperature=1.5, seed=1, max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_logprobs_are_returned_for_every_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [3] * len(logprobs.content)
    assert all(token.logprob <= 0 for token in logprobs.content)


def test_a_json_schema_constrains_the_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0,
        max_completion_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "shape", "schema": SCHEMA, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content or "") == {"color": "red"}


def test_a_named_tool_is_called(client: OpenAI) -> None:
    """JSON allows blanks between tokens. This model would write only blanks, so they are banned."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    blank = [i for i in range(tokenizer.get_vocab_size()) if not tokenizer.decode([i]).strip()]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0,
        logit_bias={str(token): -100 for token in blank},
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "report"}},
        max_completion_tokens=64,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == "report"
    assert json.loads(call.function.arguments)["color"] in ("red", "green", "blue")


def test_auto_tool_choice_allows_a_plain_answer(client: OpenAI) -> None:
    """The tiny model never calls tools: it answers, and the parser passes the answer through."""
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, tools=[TOOL], tool_choice="auto", max_tokens=16
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_stop_strings_and_token_limits_end_the_answer(client: OpenAI) -> None:
    stopped = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, stop=[" circle"]
    )
    assert stopped.choices[0].message.content == "a red"
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        cut = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, **limit)
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage is not None
        assert cut.usage.completion_tokens == 2


def test_a_seed_makes_sampling_repeatable(client: OpenAI) -> None:
    # The model is never certain of all coordinates of a box.
    asked: Any = user(image_part(RED), text_part("Give the bounding box of the circle."))

    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=asked, temperature=2, seed=seed, max_tokens=12
        )
        return answer.choices[0].message.content

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_responses_answer_about_an_image(client: OpenAI) -> None:
    question: Any = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url(RED), "detail": "auto"},
                {"type": "input_text", "text": "What is in the image?"},
            ],
        }
    ]
    answer = client.responses.create(
        model=MODEL, input=question, temperature=0, max_output_tokens=16
    )
    assert answer.output_text == "a red circle"


def test_responses_accept_a_handwritten_history(client: OpenAI) -> None:
    question = {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(RED)},
            {"type": "input_text", "text": "What is in the image?"},
        ],
    }
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "a red circle"}]}
    again = {"role": "user", "content": [{"type": "input_text", "text": "What is in the image?"}]}
    histories: list[Any] = [
        [question, answer, again],
        [question, {**answer, "type": "message", "id": None, "status": None}, again],
        [question, {"role": "assistant", "content": "a red circle"}, again],
        [question, {"type": "reasoning"}, answer, again],
    ]
    answers = [
        client.responses.create(model=MODEL, input=history, temperature=0, max_output_tokens=16)
        for history in histories
    ]
    tokens = [each.usage.input_tokens for each in answers if each.usage is not None]
    assert tokens[0] == tokens[1] == tokens[2]
    assert {each.output_text for each in answers[:3]} == {answers[0].output_text}
    calls: Any = [
        question,
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "a red circle"},
    ]
    assert client.responses.create(model=MODEL, input=calls, max_output_tokens=4).output_text


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "assistant", "content": [{"type": "output_text"}]}, "input[1].content[0].type"),
        ({"role": "nobody", "content": "x"}, "input[1].role"),
        ({"role": "user"}, "input[1].content"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[1].arguments"),
    ],
)
def test_an_invalid_responses_item_is_refused_with_its_param(
    client: OpenAI, item: Any, param: str
) -> None:
    question: Any = [{"role": "user", "content": "hi"}, item]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model=MODEL, input=question)
    assert refusal.value.param == param
    assert len(refusal.value.message) < 300


def test_responses_accept_a_large_picture(client: OpenAI) -> None:
    part = {"type": "input_image", "image_url": data_url(LARGE_BLUE), "detail": "auto"}
    question: Any = [{"role": "user", "content": [part]}]
    answer = client.responses.create(model=MODEL, input=question, max_output_tokens=4)
    assert answer.usage is not None
    assert answer.usage.input_tokens > 200


@pytest.mark.parametrize(("picture", "least_tokens"), [(RED, 60), (LARGE_BLUE, 200)])
def test_messages_answer_about_an_image(server: Server, picture: bytes, least_tokens: int) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        source: Any = {
            "type": "base64",
            "media_type": "image/png",
            "data": data_url(picture).partition(",")[2],
        }
        content: Any = [
            {"type": "image", "source": source},
            {"type": "text", "text": "What is in the image?"},
        ]
        answer = client.messages.create(
            model=MODEL,
            max_tokens=16,
            messages=[{"role": "user", "content": content}],
            extra_body={"temperature": 0},
        )
    usage = answer.usage
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert usage.input_tokens + cached > least_tokens
    if picture is RED:
        assert answer.content[0].text == "a red circle"  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_messages_refuse_invalid_image_data(http: httpx.Client, path: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    message = {"role": "user", "content": [{"type": "image", "source": source}]}
    response = http.post(path, json={"model": MODEL, "max_tokens": 4, "messages": [message]})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "unsupported_image_format"
    assert error["param"] == "messages[0].content[0].source"


def test_messages_errors_have_anthropics_shape(server: Server, http: httpx.Client) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(
                model="no-such-model", max_tokens=1, messages=[{"role": "user", "content": "hi"}]
            )
        body: Any = missing.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
        assert body["request_id"] == missing.value.response.headers["x-request-id"]
        image: Any = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(
                model=MODEL, max_tokens=1, messages=[{"role": "user", "content": [image]}]
            )
        body = refused.value.body
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["param"].startswith("messages[0].content[0].source")
    unfit = http.post("/v1/messages", json={"model": MODEL, "max_tokens": 1, "messages": 3})
    assert unfit.json()["error"]["param"] == "messages"


def test_tokenize_counts_image_tokens(http: httpx.Client) -> None:
    request = {"model": MODEL, "messages": ASK}
    first, again = (http.post("/tokenize", json=request).json() for _ in range(2))
    assert first["count"] == again["count"] == ASK_TOKENS


def test_detokenize_returns_the_text_of_tokens(http: httpx.Client) -> None:
    asked = http.post("/tokenize", json={"model": MODEL, "prompt": "a red circle"}).json()
    tokens = asked["tokens"]
    answer = http.post("/detokenize", json={"model": MODEL, "tokens": tokens})
    assert (answer.status_code, answer.json()) == (200, {"prompt": "a red circle"})


def test_completions_models_and_metrics_respond(client: OpenAI, http: httpx.Client) -> None:
    completion = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 3
    assert [model.id for model in client.models.list()] == [MODEL]
    metrics = http.get("/metrics").text
    assert "vllm:num_requests_running" in metrics
    assert "saccade_image_decode_seconds_count" in metrics


def test_health_ready_and_version_respond(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    version = http.get("/version").json()
    assert version["version"].startswith("0.32.0")
    assert version["saccade"]


def test_openapi_lists_chat_and_responses(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert "/v1/responses" in paths


@pytest.mark.parametrize(
    ("change", "param", "error"),
    [
        ({"model": "no-such-model"}, None, openai.NotFoundError),
        ({"temperature": "hot"}, "temperature", openai.BadRequestError),
        ({"logit_bias": {"999999": 1}}, "logit_bias", openai.BadRequestError),
        ({"messages": "hello"}, "messages", openai.BadRequestError),
        ({"messages": 3}, None, openai.BadRequestError),
        ({"stream_options": 3}, None, openai.BadRequestError),
        ({"response_format": {"type": "x"}}, "response_format.type", openai.BadRequestError),
        ({"max_tokens": 10_000_000}, "max_tokens", openai.BadRequestError),
    ],
)
def test_errors_have_openais_shape(
    client: OpenAI, change: Any, param: str | None, error: type[openai.APIStatusError]
) -> None:
    request: Any = {"model": MODEL, "messages": ASK, **change}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request)
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert isinstance(body["code"], str)
    if param is not None:
        assert body["param"] == param


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": 1}'])
def test_a_malformed_body_is_a_400(http: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_routes_and_content_types_are_refused(http: httpx.Client) -> None:
    assert http.get("/nowhere").status_code == 404
    assert http.get("/nowhere").json()["error"]["code"] == "not_found"
    response = http.post("/v1/chat/completions", content=b"x", headers={"Content-Type": "x/y"})
    assert response.status_code == 415 or response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
